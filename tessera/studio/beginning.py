"""The page that starts a training from a folder of images: first the plan, then the run."""

from __future__ import annotations

from typing import Any

from tessera.errors import TesseraError
from tessera.studio import html
from tessera.studio.control import Wish
from tessera.studio.desk import Desk, gradio
from tessera.studio.words import said_in_words


class BeginPage:
    """Controls and what they do.

    Args:
        desk: of the studio.
        tabs: the pages, of which "watch" is opened once a training has begun.
        which: the list of runs on that page.
    """

    def __init__(self, desk: Desk, tabs: Any, which: Any) -> None:
        self._desk = desk
        gr = gradio()
        plan = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                images = gr.Textbox(
                    label="Images",
                    placeholder="~/photos",
                    info="A folder or archive of this machine. Sub-folders are classes.",
                    elem_id="begin-images",
                )
                minutes = gr.Number(
                    None, label="Minutes", minimum=0, elem_id="begin-minutes",
                    info="Of training; empty or 0: as many as it needs here, 60 at most.",
                )  # fmt: skip
                changes = gr.Textbox(
                    label="Changes, as KEY=VALUE",
                    placeholder="data.resolution=64 training.batch=32",
                    lines=2,
                    info="Of any key of the recipe; everything else is chosen for this machine.",
                    elem_id="begin-changes",
                )
                show = gr.Button("Show the plan", variant="primary", elem_id="begin-plan")
                name = gr.Textbox(
                    label="Name of the run", elem_id="begin-name",
                    info="Its folder, among the others.",
                )  # fmt: skip
                go = gr.Button("Start training", interactive=False, elem_id="begin-go")
            with gr.Column(scale=3, min_width=320):
                notice = gr.HTML(padding=False, elem_id="begin-notice")
                table = gr.HTML(
                    html.empty(
                        "No plan yet",
                        "Name a folder of photographs. The plan shows what would be trained on "
                        "this machine, and how long it takes; nothing is started.",
                    ),
                    elem_id="begin-table",
                    padding=False,
                )
        wish = [images, minutes, changes]
        show.click(
            self.plan,
            [*wish, name],
            [notice, table, plan, name, go],
            concurrency_id="model",
            show_progress="full",
            show_progress_on=[table],
            api_name="plan",
        )
        go.click(
            self._started,
            [*wish, name, plan],
            [notice, tabs, which, go],
            api_visibility="private",
            show_progress="hidden",
        )
        gr.on(
            [part.input for part in wish],
            lambda: gr.Button(interactive=False),
            None,
            [go],
            queue=False,
            api_visibility="private",
        )

    def plan(self, images: str, minutes: float | None, changes: str, name: str) -> list[Any]:
        """The plan, which can be started if there is nothing wrong."""
        gr = gradio()
        try:
            wish = Wish.read(images or "", minutes or None, changes or "")
            made = wish.plan()
        except Exception as error:
            return [
                html.notice(said_in_words(error)),
                "",
                None,
                gr.skip(),
                gr.Button(interactive=False),
            ]
        new = name.strip() or self._desk.control.suggestion(images)
        return ["", html.plan(made.rows()), made.plan.minutes, new, gr.Button(interactive=True)]

    def _started(
        self, images: str, minutes: float | None, changes: str, name: str, planned: float | None
    ) -> list[Any]:
        gr = gradio()
        try:
            if planned is None:
                raise TesseraError("look at the plan first")
            wish = Wish.read(images or "", minutes or None, changes or "")
            run = self._desk.control.start(wish, name or "", planned)
            names = self._desk.runs.names()
        except Exception as error:
            return [html.notice(said_in_words(error)), gr.skip(), gr.skip(), gr.skip()]
        return [
            html.notice(f"{run} is being prepared", "good"),
            gr.Tabs(selected="watch"),
            gr.Dropdown(choices=names, value=run),
            gr.Button(interactive=False),
        ]
