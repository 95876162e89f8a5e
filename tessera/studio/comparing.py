"""The page that sets runs side by side."""

from __future__ import annotations

from collections.abc import Iterator

from tessera.errors import TesseraError
from tessera.reports.page import Picture
from tessera.sampling.seeds import parse_seeds
from tessera.studio import html
from tessera.studio.bench import Request
from tessera.studio.desk import Desk, gradio
from tessera.studio.words import said_in_words

_SEEDS = 16  # images of each run


class ComparePage:
    """Controls and what they do.

    Attributes:
        which: the list of runs.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        gr = gradio()
        with gr.Row(equal_height=True):
            self.which = gr.Dropdown(
                [],
                label="Runs",
                multiselect=True,
                max_choices=len(html.KINDS),
                scale=4,
                elem_id="compare-runs",
                interactive=True,
            )
            seeds = gr.Textbox(
                "0-7",
                label="Seeds",
                info=f"Up to {_SEEDS} of each; empty for none.",
                scale=1,
                min_width=140,
                elem_id="compare-seeds",
            )
            button = gr.Button(
                "Compare", variant="primary", scale=1, min_width=120, elem_id="compare-go"
            )
        notice = gr.HTML(padding=False, elem_id="compare-notice")
        table = gr.HTML(
            html.empty("Nothing compared yet", "Choose two runs or more."),
            elem_id="compare-table",
            padding=False,
        )
        grids = gr.HTML(padding=False, elem_id="compare-grids")
        button.click(
            self.compare,
            [self.which, seeds],
            [notice, table, grids],
            api_name="compare",
            show_progress="minimal",
            concurrency_id="model",
        )

    def compare(self, names: list[str] | None, seeds: str) -> Iterator[tuple[str, str, str]]:
        """First the curves and the table, then samples, run by run."""
        table, problems = "", list[str]()
        try:
            if not names:
                raise TesseraError("choose the runs to compare")
            table = html.compared([self._desk.runs.look(name) for name in names])
            wanted = parse_seeds(seeds) if seeds.strip() else []
            if len(wanted) > _SEEDS:
                raise TesseraError(f"`seeds={seeds}`: {len(wanted)}; up to {_SEEDS} of each run")
        except Exception as error:
            yield html.notice(said_in_words(error)), table, ""
            return
        yield "", table, ""
        rows: list[tuple[str, list[Picture]]] = []
        for name in names if wanted else []:
            try:
                rows.append((name, self._samples(name, seeds)))
            except Exception as error:
                problems.append(f"{name}: {said_in_words(error)}")
            made = html.grids(rows, wanted) if rows else ""
            yield html.notice("\n".join(problems), "quiet"), table, made

    def _samples(self, name: str, seeds: str) -> list[Picture]:
        """Samples as the run's own recipe makes them; of all classes in turn."""
        pipe, _ = self._desk.bench.about(name)
        label = "balanced" if pipe.model.num_classes else "random"
        *_, last = self._desk.bench.make(Request(name, seeds, label))
        assert last.images is not None
        pairs = zip(last.seeds, last.images, strict=True)
        return [Picture(image, f"{name}, seed {seed}") for seed, image in pairs]
