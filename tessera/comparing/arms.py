"""The arms of a comparison: what each trains, in how much time or work, and what it leaves."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tessera.comparing.timed import TIMED, Budget, Scored, averaged, scored, train_within
from tessera.errors import TesseraError
from tessera.files import read_json, user_path, write_json
from tessera.metrics.reference import Reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.experts import assemble
from tessera.pipelines.loading import estimate
from tessera.pipelines.relay import assemble_relay
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.training.trainer import Trainer

DONE = "arm.json"
JOINS: dict[str, Callable[[Sequence[Pipeline]], Pipeline]] = {
    "relay": assemble_relay,
    "experts": assemble,
}
"""How the models of several stages become one: the kinds of `Arm.join`."""


@dataclass(frozen=True)
class Stage:
    """A recipe that an arm trains for its share of the time.

    Attributes:
        source: a recipe, by name or file.
        changes: `key.path=value` of this recipe, after those of the arm.
        share: of the time, or of the FLOPs; those of an arm's stages are 1 together.
        begins_as: number of the stage, from 0, whose last weights it begins with; None for fresh
            ones.
        joined: its model is one of those that become the arm's; others only begin with it.
    """

    source: str
    changes: tuple[str, ...] = ()
    share: float = 1.0
    begins_as: int | None = None
    joined: bool = True


@dataclass(frozen=True)
class Way:
    """Options of sampling, for a row of the table of its own.

    Attributes:
        name: in tables, behind the arm's.
        options: of sampling, in place of those of the settings.
    """

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared: it trains for a time and is a pipeline then.

    Attributes:
        name: in tables.
        source: a recipe, by name or file, or the folder of a run or pipeline; "" with `stages`.
        changes: `key.path=value` of the recipe, or of those of all stages.
        ways: in which it is sampled; the scores on the way are of the first.
        stages: recipes that are trained one after the other, in place of `source`.
        join: how the stages' models become one, a key of `JOINS`.
    """

    name: str
    source: str = ""
    changes: tuple[str, ...] = ()
    ways: tuple[Way, ...] = (Way(),)
    stages: tuple[Stage, ...] = ()
    join: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Arm:
        """What `dataclasses.asdict` made plain, after JSON."""
        stages = [Stage(**{**s, "changes": tuple(s["changes"])}) for s in values["stages"]]
        return cls(
            values["name"],
            values["source"],
            tuple(values["changes"]),
            tuple(Way(**way) for way in values["ways"]),
            tuple(stages),
            values["join"],
        )

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return file_name(self.name)

    @property
    def trained(self) -> bool:
        """Whether it is a folder, which is sampled as it is."""
        return not self.stages and user_path(self.source).is_dir()

    @property
    def trainings(self) -> tuple[Stage, ...]:
        """What it trains, in order."""
        return self.stages or (Stage(self.source),)


@dataclass(frozen=True)
class CompareSettings:
    """What all arms have in common.

    Attributes:
        minutes: of training, of each arm.
        flops: of training, of each arm, in place of the minutes.
        points: scores on the way, spread evenly, the last at the end.
        samples: images of a score, of seeds 0, 1, ...
        batch: images made at once.
        seed: of the trainings.
        trainings: of each recipe, of as many seeds from `seed` on.
        sampling: options of sampling, in place of the recipes'.
        equal_cost: score the other arms also with as many steps as cost the first arm's FLOPs.
        reference: images, or a file of `tessera eval reference`; None: the images at data.path.
    """

    minutes: float = 10
    flops: float | None = None
    points: int = 4
    samples: int = 500
    batch: int = 100
    seed: int = 0
    trainings: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    equal_cost: bool = False
    reference: str | None = None

    @property
    def seeds(self) -> range:
        """Of the trainings."""
        return range(self.seed, self.seed + self.trainings)

    def budget(self, share: float) -> Budget:
        """That of a stage."""
        if self.flops is not None:
            return Budget(flops=self.flops * share)
        return Budget(seconds=60 * self.minutes * share)


@dataclass(frozen=True)
class Point:
    """An arm on its way.

    Attributes:
        minutes: of training.
        images: seen so far.
        distance: Fréchet distance on the features of the classifier; None without one.
        recognised: share of the samples taken for their class.
    """

    minutes: float
    images: int
    distance: float | None
    recognised: float | None


def file_name(words: str) -> str:
    """A name as that of a file or folder."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in words)


def place(arm: Arm, out: Path, settings: CompareSettings, seed: int) -> Path:
    """The folder of an arm's training; those of further seeds have them in their names."""
    return out / (arm.folder if seed == settings.seed else f"{arm.folder}-seed-{seed}")


def recipe_of(arm: Arm, stage: Stage, seed: int, *further: str) -> Recipe:
    """What a stage trains.

    Raises:
        RecipeError: its changes do not fit.
    """
    changes = [*TIMED, f"training.seed={seed}", *arm.changes, *stage.changes, *further]
    return load_recipe(stage.source, changes)


def train_arm(
    arm: Arm,
    out: Path,
    settings: CompareSettings,
    reference: Reference | None,
    seed: int | None = None,
) -> None:
    """Train an arm for its time or FLOPs, with scores on the way; its folder is then done.

    Scores of an arm of stages begin in the last of them, before which there is nothing to sample.
    """
    seed = settings.seed if seed is None else seed
    folder = place(arm, out, settings, seed)
    if folder.exists():
        _clear(folder)
    training = _Training(arm, settings, reference, folder, seed)
    training.run()
    training.pipeline().save(folder / "pipeline")
    content = {
        "settings": _facts(arm, settings, seed),
        "points": [asdict(point) for point in training.points],
        "minutes": training.seconds / 60,
        "flops": training.flops,
        "images": training.images,
    }
    write_json(folder / DONE, content)


class _Training:
    """The stages of an arm, one after the other, and its scores on the way."""

    def __init__(
        self,
        arm: Arm,
        settings: CompareSettings,
        reference: Reference | None,
        folder: Path,
        seed: int,
    ) -> None:
        self._arm, self._settings, self._reference = arm, settings, reference
        self._folder, self._seed = folder, seed
        self._before: list[Pipeline] = []
        self._trainer: Trainer | None = None
        self.points: list[Point] = []
        self.seconds = self.flops = 0.0

    def run(self) -> None:
        """Train all stages."""
        stages = self._arm.trainings
        done, passed = 0.0, 0
        for index, stage in enumerate(stages):
            last = index == len(stages) - 1
            trainer = self._begin(stage)
            per_image = estimate(trainer.recipe).train_flops
            seconds, flops = self.seconds, self.flops
            for spent in train_within(trainer, self._settings.budget(stage.share), per_image):
                self.seconds = seconds + spent.seconds
                self.flops = flops + per_image * trainer.images_seen
                share = 1.0 if last and spent.share >= 1 else done + stage.share * spent.share
                # Shares of several stages add up but for rounding.
                reached = int(share * self._settings.points + 1e-9)
                if reached == passed:
                    continue
                passed = reached
                if last:
                    self.points.append(self._point())
            done += stage.share

    def pipeline(self) -> Pipeline:
        """What has been trained so far, as one."""
        assert self._trainer is not None
        pipes = [*self._before, averaged(self._trainer)]
        if not self._arm.stages:
            return pipes[0]
        joined = [p for p, stage in zip(pipes, self._arm.stages, strict=True) if stage.joined]
        return JOINS[self._arm.join](joined)

    @property
    def images(self) -> int:
        """That all stages have seen so far."""
        assert self._trainer is not None
        return sum(pipe.images_seen for pipe in self._before) + self._trainer.images_seen

    def _begin(self, stage: Stage) -> Trainer:
        further = []
        if self._trainer is not None:
            self._before.append(averaged(self._trainer))
        if stage.begins_as is not None:
            start = self._folder / f"stage-{stage.begins_as}"
            if not start.exists():
                self._before[stage.begins_as].save(start)
            further.append(f"training.initial_weights={start}")
        recipe = recipe_of(self._arm, stage, self._seed, *further)
        self._trainer = Trainer(recipe, run_folder(self._folder, len(self._before)))
        return self._trainer

    def _point(self) -> Point:
        pipe, score = self.pipeline(), None
        if self._reference is not None:
            score = score_arm(pipe, self._reference, self._settings, self._arm.ways[0]).score
        return Point(
            self.seconds / 60,
            self.images,
            None if score is None else score.fd_classifier,
            None if score is None else score.recognised,
        )


def run_folder(folder: Path, stage: int) -> Path:
    """The run of a stage of an arm."""
    return folder / (f"run-{stage}" if stage else "run")


def score_arm(
    pipe: Pipeline, reference: Reference | None, settings: CompareSettings, way: Way
) -> Scored:
    """Sample and score an arm in one of its ways."""
    options = {**settings.sampling, **way.options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images: the table says how many
        return scored(pipe, reference, settings.samples, settings.batch, options)


def _facts(arm: Arm, settings: CompareSettings, seed: int) -> Any:
    """What decides how an arm has been trained and scored on the way, as JSON has it."""
    own = {**asdict(arm), "ways": asdict(arm.ways[0])}
    common = {**asdict(settings), "seed": seed}
    for name in ("trainings", "equal_cost"):  # which are of the whole
        del common[name]
    return json.loads(json.dumps({**own, **common}))


def is_done(arm: Arm, out: Path, settings: CompareSettings, seed: int) -> bool:
    """Whether the arm has been trained with these settings.

    Raises:
        TesseraError: with others.
    """
    path = place(arm, out, settings, seed) / DONE
    if not path.is_file():
        return False
    if read_json(path).get("settings") != _facts(arm, settings, seed):
        raise TesseraError(
            f"{path.parent} was made with other settings; choose another folder by --out"
        )
    return True


def _clear(folder: Path) -> None:
    """Remove an arm that was not finished; nothing else."""
    strange = [
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(("run-", "stage-")) and path.name not in ("run", "pipeline")
    ]
    if strange:
        raise TesseraError(f"{folder} holds {strange[0]}; choose another folder by --out")
    shutil.rmtree(folder)
