"""The page that watches a run, stops it and resumes it."""

from __future__ import annotations

import contextlib
from typing import Any

from tessera.studio import html
from tessera.studio.desk import Desk, gradio, kept
from tessera.studio.live import LiveRun
from tessera.studio.words import said_in_words
from tessera.training.run_folder import longer

EVERY = 2.0
"""Seconds between two looks at a run."""
_PARTS = ("status", "curve", "preview", "output")
NO_RUNS = html.empty(
    "No runs yet",
    "Start one on the page Train, or in a terminal: tessera train photos/. It is listed here as "
    "soon as its folder is there.",
)


class WatchPage:
    """Controls and what they do.

    Attributes:
        which: the drop-down list of runs.
        shown: the parts that a look at a run renews.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        gr = gradio()
        # What was shown last, so that only what has changed is sent. It is kept by the browser (a
        # State is kept by the server): answers may arrive in another order than they were made in.
        self._seen = gr.JSON({}, visible=False)
        with gr.Row(equal_height=True):
            self.which = gr.Dropdown(
                [], label="Run", scale=4, elem_id="watch-run", interactive=True
            )
            self._stop = gr.Button(
                "Stop and save", variant="stop", scale=1, min_width=120, elem_id="watch-stop"
            )
            self._resume = gr.Button("Resume", scale=1, min_width=120, elem_id="watch-resume")
        self._notice = gr.HTML(padding=False, elem_id="watch-notice")
        status = gr.HTML(NO_RUNS, padding=False, elem_id="watch-status")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                curve = gr.HTML(padding=False, elem_id="watch-curve")
            with gr.Column(scale=2, min_width=280):
                preview = gr.HTML(padding=False, elem_id="watch-preview")
        output = gr.HTML(padding=False, elem_id="watch-output")
        with gr.Accordion("Resume with changes", open=False):
            self._changes = gr.Textbox(
                label="KEY=VALUE of the recipe",
                placeholder="training.images=200000",
                info="Such as more images or minutes; what would make another run is refused.",
                elem_id="watch-changes",
            )
        self.shown = [status, curve, preview, output, self._stop, self._resume, self._changes]
        self._listen(gr)

    def _listen(self, gr: Any) -> None:
        look = {"inputs": [self.which, self._seen], "outputs": [self._seen, *self.shown]}
        quiet = {"show_progress": "hidden", "queue": False}
        timer = gr.Timer(EVERY)
        timer.tick(
            self.tick,
            [self.which, self._seen],
            [self.which, self._seen, *self.shown],
            api_name="watch",
            **quiet,
        )
        self.which.change(self.look, **look, **quiet, api_visibility="private")
        pressed = {"outputs": [self._notice], **quiet, "api_visibility": "private"}
        self._stop.click(self._stopped, [self.which], **pressed).then(
            self.look, **look, **quiet, api_visibility="private"
        )
        self._resume.click(self._resumed, [self.which, self._changes], **pressed).then(
            self.look, **look, **quiet, api_visibility="private"
        )

    def tick(self, name: str | None, seen: dict[str, Any] | None) -> list[Any]:
        """A look at the run, and at which runs there are."""
        seen = seen or {}
        gr, names, chosen = gradio(), list[str](), name
        with contextlib.suppress(OSError):
            names = self._desk.runs.names()
        listed = gr.skip()
        # A run that was chosen and is gone stays chosen: the page says that it is gone.
        chosen = name or kept(None, names)
        if seen.get("names") != names or chosen != name:
            choices = names if chosen is None or chosen in names else [chosen, *names]
            # What was chosen stays, also if another one has been chosen since this look began.
            value = {} if chosen == name else {"value": chosen}
            listed = gr.Dropdown(choices=choices, **value)
        return [listed, *self.look(chosen, {**seen, "names": names})]

    def look(self, name: str | None, seen: dict[str, Any] | None) -> list[Any]:
        """What was shown, now, and what has changed of it."""
        seen = seen or {}
        gr = gradio()
        try:
            run = None if not name else self._desk.runs.look(name)
            parts, buttons = self._parts(run)
        except Exception as error:
            parts = dict.fromkeys(_PARTS, "") | {"status": html.notice(said_in_words(error))}
            buttons = [False, False, ""]
        # JavaScript has no whole numbers of 64 bits.
        marks = {part: f"{hash(text):x}" for part, text in parts.items()}
        now = {**seen, **marks, "buttons": buttons}
        renewed = [
            text if seen.get(part) != now[part] else gr.skip() for part, text in parts.items()
        ]
        if seen.get("buttons") == buttons:
            return [now, *renewed, *[gr.skip()] * 3]
        can_stop, can_resume, hint = buttons
        return [
            now,
            *renewed,
            gr.Button(interactive=can_stop),
            gr.Button(interactive=can_resume),
            gr.Textbox(placeholder=hint),
        ]

    def _parts(self, run: LiveRun | None) -> tuple[dict[str, str], list[Any]]:
        """The HTML of each part, and what can be clicked."""
        if run is None:
            return dict.fromkeys(_PARTS, "") | {"status": NO_RUNS}, [False, False, ""]
        parts = {
            "status": html.status(run),
            "curve": html.curve(run) if run.recipe is not None else "",
            "preview": html.preview(run.preview) if run.recipe is not None else "",
            "output": html.output(run.output),
        }
        resumable = run.state in ("stopped", "killed", "failed", "finished")
        hint = "" if run.recipe is None else longer(run.recipe)
        return parts, [run.alive, resumable and run.recipe is not None, hint]

    def _stopped(self, name: str | None) -> str:
        return _said(lambda: self._desk.control.stop(name))

    def _resumed(self, name: str | None, changes: str) -> str:
        return _said(lambda: self._desk.control.resume(name, changes))


def _said(act: Any) -> str:
    """What an action says of itself, or why it could not be done."""
    try:
        return html.notice(act(), "good")
    except Exception as error:
        return html.notice(said_in_words(error))
