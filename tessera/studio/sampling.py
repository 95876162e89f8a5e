"""The page that makes samples, with controls for what the model at hand takes."""

from __future__ import annotations

import itertools
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tessera.pipelines.base import Pipeline
from tessera.studio import html
from tessera.studio.bench import MOST, Making, Request, class_name, saved_pngs
from tessera.studio.desk import Desk, gradio
from tessera.studio.knobs import Knob, given_options, knobs
from tessera.studio.words import said_in_words

_LABELS = [("random", "random"), ("in turn", "balanced"), ("no class", "none")]
_LISTED = 1000  # classes in a drop-down list
_SETS = 8  # sets of files that are kept to be downloaded
_sets = itertools.count()


class SamplePage:
    """Controls and what they do.

    Attributes:
        which: the drop-down list of runs and pipelines.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        gr = gradio()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.which = gr.Dropdown(
                    [], label="Model", elem_id="sample-model", interactive=True
                )
                self._sampler = gr.State(None)
                # The controls are made for the model that is chosen.
                gr.render(
                    inputs=[self.which, self._sampler],
                    triggers=[self.which.change, self._sampler.change],
                    show_progress="hidden",
                )(self._panel)
            with gr.Column(scale=5, min_width=320):
                self._notice = gr.HTML(padding=False, elem_id="sample-notice")
                self._gallery = gr.Gallery(
                    label="Samples",
                    show_label=False,
                    columns=8,
                    object_fit="contain",
                    format="png",
                    interactive=False,
                    elem_id="sample-gallery",
                    height="auto",
                )
                self._zip = gr.DownloadButton(
                    "Download all as PNG", visible=False, elem_id="sample-zip", size="sm"
                )
                self._facts = gr.HTML(padding=False, elem_id="sample-facts")
                gr.Markdown("### How they come about", elem_id="sample-course-title")
                self._course = gr.HTML(
                    html.empty("Nothing sampled yet", "Choose a model, and press Sample."),
                    elem_id="sample-course",
                    padding=False,
                )
        self.which.change(
            lambda: None, None, [self._sampler], queue=False, api_visibility="private"
        )

    def _panel(self, name: str | None, sampler: str | None) -> None:
        """The controls of a model."""
        gr = gradio()
        if not name:
            gr.HTML(
                html.empty(
                    "No model yet",
                    "Runs write one with their first checkpoint; pipelines made by tessera convert "
                    "or tessera relay are listed, too.",
                )
            )
            return
        try:
            pipe, options = self._desk.bench.about(name, sampler)
        except Exception as error:
            gr.HTML(html.notice(said_in_words(error)), elem_id="sample-problem")
            return
        shown = knobs(options)
        with gr.Row():
            seeds = gr.Textbox(
                "0-7", label="Seeds", info=f"Like 0-7,100; at most {MOST}.", elem_id="sample-seeds",
                interactive=True, min_width=120,
            )  # fmt: skip
            label = _class_list(gr, pipe)
        made: dict[str, Any] = {}
        for one in shown:
            if one.first:
                made[one.name] = _control(gr, one)
        with gr.Row():
            button = gr.Button("Sample", variant="primary", elem_id="sample-go", min_width=120)
            stop = gr.Button("Stop", elem_id="sample-stop", min_width=80)
        with gr.Accordion("All options of this model", open=False, elem_id="sample-all"):
            section = None
            for one in shown:
                if one.first:
                    continue
                if one.section != section:
                    section = one.section
                    gr.Markdown(f"**{section}**")
                made[one.name] = _control(gr, one)
        more = gr.Textbox(
            label="More, as KEY=VALUE",
            info="Takes the place of the controls. " + _typed_only(options, shown),
            elem_id="sample-more",
            interactive=True,
        )
        controls = [made[one.name] for one in shown]

        def sample(
            seeds: str, label: str | int | None, more: str, *values: Any
        ) -> Iterator[tuple[Any, ...]]:
            yield from self._sampled(name, seeds, label, more, shown, values)

        outputs = [self._notice, self._gallery, self._zip, self._facts, self._course]
        going = button.click(
            sample,
            [seeds, label, more, *controls],
            outputs,
            show_progress="hidden",
            concurrency_id="model",
        )
        stop.click(None, None, None, cancels=[going], queue=False)
        if "sampler" in made:
            made["sampler"].input(
                lambda kind: kind, [made["sampler"]], [self._sampler], queue=False
            )

    def _sampled(
        self, name: str, seeds: str, label: str | int | None, more: str, shown: Sequence[Knob],
        values: Sequence[Any],
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Samples while they are made."""
        gr = gradio()
        stay = [gr.skip(), gr.skip(), gr.skip()]
        try:
            options = given_options(shown, values, more)
            request = Request(name, seeds, "random" if label is None else label, options)
            frames = -1
            for made in self._desk.bench.make(request):
                if made.images is not None:
                    files = self._files(made)
                    archive = gr.DownloadButton(value=str(files[0]), visible=True)
                    course = html.making(made.frames, 1.0)
                    yield "", _captioned(files[1:], made), archive, html.facts(made.facts), course
                elif len(made.frames) != frames:
                    frames = len(made.frames)
                    yield "", *stay, html.making(made.frames, made.share)
        except Exception as error:
            yield html.notice(said_in_words(error)), *stay, gr.skip()

    def _files(self, made: Making) -> list[Path]:
        """A ZIP of PNGs, and these; the oldest sets are removed."""
        number = next(_sets)
        place = self._desk.scratch / f"samples-{number}"
        paths = saved_pngs(made, place)
        archive = place / "samples.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
            for path in paths:
                file.write(path, path.name)
        shutil.rmtree(self._desk.scratch / f"samples-{number - _SETS}", ignore_errors=True)
        return [archive, *paths]


def _captioned(paths: Sequence[Path], made: Making) -> list[tuple[str, str]]:
    """Files with the seed and class of each."""
    labels = made.labels or ("",) * len(paths)
    names = (
        f"{seed}, {label}" if label else f"{seed}"
        for seed, label in zip(made.seeds, labels, strict=True)
    )
    return [(str(path), name) for path, name in zip(paths, names, strict=True)]


def _class_list(gr: Any, pipe: Pipeline) -> Any:
    """The classes, if the model knows any."""
    count = pipe.model.num_classes
    if not count:
        return gr.State("random")
    classes = [(class_name(pipe, label), label) for label in range(min(count, _LISTED))]
    return gr.Dropdown(
        [*_LABELS, *classes],
        value="balanced",
        label="Class",
        allow_custom_value=count > _LISTED,
        elem_id="sample-class",
        interactive=True,
        min_width=120,
    )


def _control(gr: Any, one: Knob) -> Any:
    """The control of an option."""
    about = {
        "label": one.name, "info": one.meaning or None, "elem_id": f"option-{one.name}",
        "interactive": True,  # which Gradio does not see of what is made while the page is shown
    }  # fmt: skip
    if one.kind == "switch":
        return gr.Checkbox(one.value, **about)
    if one.kind == "choice":
        return gr.Dropdown([*one.choices], value=one.value, **about)
    if one.kind == "slider":
        return gr.Slider(one.low, one.high, one.value, step=one.step, **about)
    if one.kind == "number":
        return gr.Number(one.value, precision=0 if one.whole else None, **about)
    return gr.Textbox(str(one.value), **about)


def _typed_only(options: Sequence[Any], shown: Sequence[Knob]) -> str:
    """Which options have no control."""
    rest = [option.name for option in options if option.name not in {one.name for one in shown}]
    return f"Only here: {', '.join(rest)}." if rest else ""
