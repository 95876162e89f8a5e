"""The training loop."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera import distributed, precision
from tessera.data.dataset import Dataset
from tessera.data.loader import Batch
from tessera.errors import TrainingError
from tessera.files import user_path
from tessera.pipelines.base import Pipeline
from tessera.pipelines.folder import holds, start_from
from tessera.progress import progress
from tessera.recipes.latents import check_vae, with_latents_told
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe
from tessera.recipes.views import with_bands_told
from tessera.training import faults, run_folder, run_lock, tracking
from tessera.training.checkpoints import Checkpoints, load_tensors, read_state
from tessera.training.evaluation import check_reference
from tessera.training.feed import Feed
from tessera.training.forecast import Forecast
from tessera.training.learner import Update, fresh_model, learner_of
from tessera.training.occasions import Due, occasions
from tessera.training.preview import check_labels, ema_pipeline, save_pipeline
from tessera.training.probe import measure
from tessera.training.signals import StopRequest
from tessera.training.validation import validation_images


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes:
        step: number of the step, from 1.
        images: images seen after it.
        update: what it did, on the device.
        metrics: the line that was logged after this step; None at most steps.
    """

    step: int
    images: int
    update: Update
    metrics: tracking.Metrics | None


class Trainer:
    """Trains a recipe in a run folder.

    Args:
        recipe: what to train. With `resume` it may be left out; if given, it may differ from that
            of the run only where that does not change what has been trained.
        run_dir: folder of a new run; by default the recipe's, or runs/<recipe>-<number>.
        resume: folder of an existing run to go on with, from its newest undamaged checkpoint.
        parts: functions that make the recipe's external parts; needed to resume, too.
        probe: spend up to five seconds on steps that leave no trace, to make the `forecast`.

    Attributes:
        recipe, run_dir, device: of this run; the recipe says what precision `auto` has become.
        precision_reason: why it computes in the precision that it does, in a few words.
        learner: weights, averages, optimiser.
        images_seen, step: progress so far.
        forecast: what the run will take here; None without `probe`.
        stopped_by: number of the signal that ended the run early; None otherwise.

    Raises:
        TesseraError: recipe, data or run folder do not fit; the message says what to do.

    Example:
        >>> from tessera import Parts, load_recipe
        >>> from tessera.training.probe import blank_images
        >>> recipe = load_recipe("quickstart-digits", ["training.images=64", "run.preview=null"])
        >>> trainer = Trainer(recipe, "runs/blank", parts=Parts(dataset=blank_images))
        >>> for report in trainer.steps():
        ...     if report.images >= 32:
        ...         break
        >>> trainer.save().name
        '000000000032'
        >>> trainer.pipeline().sample(range(4), steps=2).shape
        (4, 16, 16, 1)
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        run_dir: str | Path | None = None,
        resume: str | Path | None = None,
        *,
        parts: Parts = NO_PARTS,
        probe: bool = False,
    ) -> None:
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TrainingError(
                f"Trainer({recipe!r}): give a Recipe, such as load_recipe('cifar10-small', "
                "['data.path=cifar10.zip']), or resume='runs/a', the folder of a run to go on with"
            )
        if resume is not None:
            recorded = run_folder.read_recipe(resume)
            recipe = recorded if recipe is None else with_latents_told(recipe, recorded)
            run_folder.check_same(recorded, recipe)
        elif recipe is None:
            raise TrainingError("a recipe is needed to begin a run, or the folder of one to resume")
        self.device = distributed.device()
        self.precision_reason = precision.reason(recipe.training.precision, self.device)
        chosen = precision.resolve(recipe.training.precision, self.device, together=True)
        training = recipe.training.model_copy(update={"precision": chosen})
        recipe = recipe.model_copy(update={"training": training})
        # What can be refused is, before the folder of a new run is made.
        parts.check(recipe)
        self._parts = parts
        if parts.dataset is not None:
            recipe = _without_path(recipe)
        recipe = with_bands_told(with_latents_told(run_folder.anchored(recipe)))
        check_vae(recipe)
        self.recipe = recipe
        self._feed = Feed(recipe, self.device, parts)
        self._validated = validation_images(recipe, self.device, self._feed, parts)
        check_labels(recipe, self.dataset.class_names)
        tracking.check(recipe)
        if recipe.run.save_vae:
            self._feed.codec.prepare()
        if recipe.evaluate is not None and recipe.expert is None:
            check_reference(recipe, recipe.evaluate, parts)
        measured = None
        if probe:
            validated = 0 if self._validated is None else self._validated.count
            measured = measure(recipe, self._feed, self.device, parts=parts, validated=validated)
        model = fresh_model(recipe, self.device, parts)
        if resume is None:
            model.begin(self._feed.examples())
        if recipe.training.initial_weights is not None and resume is None:
            start_from(recipe.training.initial_weights, model.network)
        self.learner = learner_of(recipe, model, self.device, parts)
        self.images_seen = self.step = 0
        self.stopped_by: int | None = None
        self._meter = tracking.Meter(self.device)
        self._seconds = 0.0
        self._clock: Clock | None = None
        self.run_dir = run_folder.create(recipe, run_dir) if resume is None else user_path(resume)
        self._checkpoints = Checkpoints(self.run_dir / "checkpoints", recipe.run.keep)
        self._saved: Path | None = None
        if resume is not None:
            with run_lock.hold(self.run_dir):
                self._restore(recorded)
        self.forecast: Forecast | None = None
        if measured is not None:
            self.forecast = measured.forecast(
                recipe, self._feed.view, self.images_seen, self._seconds
            )

    @property
    def dataset(self) -> Dataset:
        """The training images or latents."""
        return self._feed.dataset

    @property
    def device_name(self) -> str:
        """The device in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        if self.device.type == "cpu":
            return f"CPU, {torch.get_num_threads()} threads"
        return self.device.type

    # ------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Train to the end, or until SIGTERM, SIGUSR1 or Ctrl-C (see `stopped_by`)."""
        for _ in self.steps():
            pass

    def steps(self, *, shown: bool = True) -> Generator[StepReport, None, None]:
        """Train; an iterator over the steps, after each of which metrics, previews and checkpoints
        that are due have been made.

        It may be left early: `save` and `pipeline` keep what was trained, and a second call goes
        on. Steps after the newest checkpoint are lost otherwise.

        Args:
            shown: show a bar, or lines where there is no terminal.

        Raises:
            TrainingError: too many steps in a row had gradients that are not finite, the disk is
                full, the memory used up, or another process gone; it names the last checkpoint.
        """
        run, total = self.recipe.run, self.recipe.training.images
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                faults.in_words(self.run_dir, self.recipe.training, lambda: self._saved)
            )
            stack.enter_context(run_lock.hold(self.run_dir))
            self._tidy()
            stop = stack.enter_context(StopRequest())
            trackers = self._open_trackers(stack, shown)
            events = occasions(
                self.recipe, self._feed, self._validated, self.run_dir, trackers, self._parts
            )
            bar = stack.enter_context(
                progress(
                    "training",
                    total,
                    unit="images",
                    completed=self.images_seen,
                    lines=False,  # a tracker prints them, with the loss
                    shown=shown,
                )
            )
            clock = stack.enter_context(self._timed())
            save_pending = False
            if self._time_over(clock):
                return
            for batch in stack.enter_context(self._feed.batches(self.images_seen)):
                before, update = self.images_seen, self._train(batch)
                over = self._time_over(clock)
                due = Due(before, self.images_seen, total, over)
                bar.update(self.images_seen)

                metrics: tracking.Metrics | None = None
                if before == 0 or due(run.log_every_images):
                    metrics = self._metrics(update, clock)
                    for tracker in trackers:
                        tracker.log(metrics)
                    end = tracking.likely_end(metrics, total, self.recipe.training.minutes)
                    bar.update(self.images_seen, tracking.describe_metrics(metrics), end)
                for event in events:
                    if due(event.every) and (not event.settled or self._settled(True)):
                        with clock.paused():
                            event.make(self.learner, self.images_seen)
                stopping = stop.agreed()
                save_pending = save_pending or stopping or due(run.checkpoint_every_images)
                if save_pending and self._settled(due.finished):
                    self._save()
                    save_pending = False
                yield StepReport(self.step, self.images_seen, update, metrics)
                if stopping and not save_pending and not due.finished:
                    self.stopped_by = stop.signal
                    return
                if over:
                    return

    def _time_over(self, clock: Clock) -> bool:
        """Whether `training.minutes` have passed; the processes agree at every tenth step."""
        minutes = self.recipe.training.minutes
        if minutes is None or (distributed.active() and self.step % 10):
            return False
        return distributed.broadcast(clock.seconds >= 60 * minutes)

    def _train(self, batch: Batch) -> Update:
        """One optimiser step."""
        rounds = self._feed.micro_batches(batch)
        update = self.learner.update(rounds, batch.plan.images, self.images_seen)
        self._meter.add(update, batch.plan.images)
        self.images_seen += batch.plan.images
        self.step += 1
        return update

    # ------------------------------------------------------- what waits for the device, seldom

    def _metrics(self, update: Update, clock: Clock) -> tracking.Metrics:
        """The line of a log interval."""
        means = self._meter.means()
        counters = self.learner.counters()
        self._check_streak(counters["skipped_in_a_row"])
        trained, seconds = clock.lap(self.images_seen)
        values: tracking.Metrics = {
            "images": self.images_seen,
            "step": self.step,
            **means,
            "lr": update.lr,
            "skipped": int(counters["skipped"]),
            "loss_scale": counters["loss_scale"],
            "seconds": round(clock.seconds, 3),
            "images_per_second": round(trained / max(seconds, 1e-9), 3),
            "memory_gb": round(tracking.memory_gb(self.device), 3),
            **{name: round(value, 4) for name, value in self._feed.reports(seconds).items()},
        }
        reports = self.learner.reports()
        if taken := sorted(values.keys() & reports.keys()):
            raise TrainingError(f"reports() names {', '.join(taken)}, which the log has already")
        return values | {name: tracking.finite(value) for name, value in reports.items()}

    def _settled(self, finished: bool) -> bool:
        """Whether the last step was a good one, so that its weights may be kept.

        Raises:
            TrainingError: the weights are not finite, or too many steps in a row were bad.
        """
        streak = self.learner.counters()["skipped_in_a_row"]
        self._check_streak(streak)
        if not self.learner.weights_finite():
            raise TrainingError(
                f"the weights are not finite after {self.images_seen} images. {self._last_good()}"
            )
        return streak == 0 or finished

    def _check_streak(self, streak: float) -> None:
        limit = self.recipe.training.max_skipped
        if streak > limit:
            raise TrainingError(
                f"the last {int(streak)} steps in a row had a loss or gradients that are not "
                f"finite (training.max_skipped is {limit}), after {self.images_seen} images. "
                + self._last_good()
            )

    def _last_good(self) -> str:
        advice = "; try a lower optimizer.lr"
        advice += " or optimizer.clip_norm=1" if self.recipe.optimizer.clip_norm is None else ""
        advice += " or training.precision=bf16" if self.recipe.training.precision == "fp16" else ""
        return f"{faults.last_good(self._saved)}{advice}, in a new run"

    # ---------------------------------------------------------------------- saving and resuming

    def save(self) -> Path:
        """Write a checkpoint of this moment, and the pipeline folder; returns the checkpoint.

        To be called between steps or after them, by all processes. A run that is resumed from it
        repeats one that was never stopped.

        Raises:
            TrainingError: the weights are not finite, or the disk is full.
        """
        # Between steps, the folder is this run's already.
        held = contextlib.nullcontext() if self._clock is not None else run_lock.hold(self.run_dir)
        with held, faults.in_words(self.run_dir, self.recipe.training, lambda: self._saved):
            self._settled(finished=True)
            return self._save()

    def pipeline(self) -> Pipeline:
        """The model with the averaged weights of this moment, on the device of the training.

        To be called between steps or after them, by all processes; each gets its own.

        Example:
            >>> trainer.pipeline().sample(range(16), steps=18)  # doctest: +SKIP
        """
        pipe = ema_pipeline(
            self.recipe,
            self.learner,
            self.images_seen,
            self.dataset.class_names,
            self._parts,
            everywhere=True,
        )
        assert pipe is not None
        return pipe.copied()  # the averages themselves go on

    def _save(self) -> Path:
        with contextlib.nullcontext() if self._clock is None else self._clock.paused():
            return self._write()

    def _write(self) -> Path:
        """Write a checkpoint, and the pipeline folder with the averaged weights."""
        state = {
            "images": self.images_seen,
            "step": self.step,
            "seconds": self._seconds if self._clock is None else self._clock.seconds,
            "counters": self.learner.counters(),
            "meter": self._meter.state(),
            "recipe": dump_recipe(self.recipe),
        }
        saved = self._checkpoints.save(
            self.images_seen, self.learner.tensors(), state, sharded=self.learner.sharded
        )
        self._saved = saved
        self._save_pipeline()
        return saved

    def _save_pipeline(self) -> None:
        pipeline = ema_pipeline(
            self.recipe,
            self.learner,
            self.images_seen,
            self.dataset.class_names,
            self._parts,
            codec=self._feed.codec,
        )
        if pipeline is not None:
            save_pipeline(pipeline, self.run_dir / "pipeline", self.run_dir)
        distributed.barrier()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[Clock]:
        """The clock of the block, whose time is added to that of the run."""
        self._clock = clock = Clock(self._seconds, self.images_seen)
        try:
            yield clock
        finally:
            if self._clock is clock:  # and not that of a later call
                self._seconds, self._clock = clock.seconds, None

    def _tidy(self) -> None:
        """Finish what a killed process may have left undone, before anything else is written."""
        with distributed.main_first():
            if distributed.is_main():
                run_folder.clean(self.run_dir)
                run_folder.write_recipe(self.run_dir, self.recipe)
                self._checkpoints.prune()
        current = self._saved is None or (
            distributed.is_main()
            and holds(self.run_dir / "pipeline", dump_recipe(self.recipe), self.images_seen)
        )
        if not distributed.broadcast(current):
            self._save_pipeline()

    def _restore(self, recorded: Recipe) -> None:
        """Go back to the newest undamaged checkpoint; to the beginning if there is none yet."""
        self._saved = self._checkpoints.newest()
        if self._saved is not None:
            state = read_state(self._saved)
            saved = parse_recipe(state.recipe, str(self._saved))
            run_folder.check_same(saved, self.recipe)
            run_folder.check_length(recorded, self.recipe, state.images)
            load_tensors(self._saved, self.learner.tensors())
            self.learner.load_counters(state.counters | self._fresh_scale(saved))
            self._meter.load(state.meter)
            self.images_seen, self.step = state.images, state.step
            self._seconds = state.seconds
        elif distributed.is_main():
            print("no checkpoint yet: training from the beginning", file=sys.stderr)

    def _fresh_scale(self, saved: Recipe) -> dict[str, float]:
        """The loss scale's counters in place of saved ones, where the precision is another now."""
        before, now = saved.training.precision, self.recipe.training.precision
        if before == now:
            return {}
        if distributed.is_main():
            print(
                f"note: training.precision was {before} and is {now} from here on: the run is no "
                "longer equal, bit for bit, to one that was never stopped",
                file=sys.stderr,
            )
        return {n: v for n, v in self.learner.counters().items() if n.startswith("loss_scale")}

    def _open_trackers(self, stack: contextlib.ExitStack, shown: bool) -> list[tracking.Tracker]:
        if not distributed.is_main():
            return []
        trackers = tracking.open_trackers(self.run_dir, self.recipe, self.images_seen, shown)
        for tracker in trackers:
            stack.callback(tracker.close)
        return trackers


def _without_path(recipe: Recipe) -> Recipe:
    """The recipe of a run on the caller's own data set: none can take its place unnoticed."""
    if recipe.data.path is None:
        return recipe
    warnings.warn(
        f"data.path={recipe.data.path} is not read, because an own data set was handed over",
        stacklevel=3,
    )
    data = recipe.data.model_copy(update={"path": None})
    return recipe.model_copy(update={"data": data})


class Clock:
    """Training time, without previews, evaluations and checkpoints.

    Args:
        seconds: what earlier parts of the run took.
        images: images seen so far.
    """

    def __init__(self, seconds: float, images: int) -> None:
        self._start = time.monotonic() - seconds
        self._mark = (seconds, images)

    @property
    def seconds(self) -> float:
        """Time spent in the whole run."""
        return time.monotonic() - self._start

    def lap(self, images: int) -> tuple[int, float]:
        """Images and seconds since the last call."""
        now = self.seconds
        (then, before), self._mark = self._mark, (now, images)
        return images - before, now - then

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin
