"""What a training left, as a program or a notebook wants it."""

from __future__ import annotations

import base64
import functools
import html
from dataclasses import dataclass, field
from pathlib import Path

from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import load
from tessera.pipelines.samples import facts_html
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe


@dataclass(frozen=True)
class TrainedRun:
    """What a training left. A notebook shows it with its samples.

    Attributes:
        run_dir: the run folder.
        recipe: that was trained, complete.
        images_seen: images trained on, counting repetitions.
        samples: a picture of samples; None for a recipe's run, and if the run was stopped.
        report: the page; None if the run was stopped, or the recipe says run.report=false.
        stopped_by: number of the signal that ended it early; None otherwise.
        parts: functions that made the recipe's external parts.
    """

    run_dir: Path
    recipe: Recipe
    images_seen: int
    samples: Path | None = None
    report: Path | None = None
    stopped_by: int | None = None
    parts: Parts = field(default=NO_PARTS, repr=False)

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The trained model, loaded from the run folder when it is first asked for.

        Raises:
            TesseraError: the run was stopped before anything was saved, or the folder has moved.
        """
        return load(self.run_dir, parts=self.parts)

    def page(self) -> ReportPage | None:
        """The report, to be shown in a notebook; None where there is none."""
        return None if self.report is None else ReportPage(self.report)

    def _repr_html_(self) -> str:
        facts = {
            "recipe": self.recipe.name,
            "run folder": str(self.run_dir),
            "images seen": f"{self.images_seen:,} of {self.recipe.training.images:,}",
        }
        if self.stopped_by is not None:
            facts["stopped"] = f"to go on: tessera.train(resume={str(self.run_dir)!r})"
        if self.report is not None:
            facts["report"] = str(self.report)
        picture = ""
        if self.samples is not None:
            png = base64.b64encode(self.samples.read_bytes()).decode()
            picture = f'<img src="data:image/png;base64,{png}" alt="samples">'
        return facts_html("trained", facts) + picture


@dataclass(frozen=True)
class ReportPage:
    """A page that a notebook shows in the output of a cell.

    Attributes:
        path: of the HTML file, which needs nothing else.
    """

    path: Path

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text("utf-8"))
        return f'<iframe srcdoc="{text}" style="width:100%;height:800px;border:0"></iframe>'
