"""Stopping, resuming and starting trainings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.errors import TesseraError
from tessera.files import user_path
from tessera.starting.begin import PlannedRun, plan_training
from tessera.starting.facts import is_collection
from tessera.studio.folder import StudioFolder
from tessera.studio.jobs import Jobs
from tessera.studio.live import LiveRuns
from tessera.training.run_folder import read_recipe


@dataclass(frozen=True)
class Wish:
    """A training from images that somebody wants.

    Attributes:
        images: absolute path of the folder, archive or set.
        minutes: of training; None for what is proposed.
        changes: `key=value` of the recipe.
    """

    images: str
    minutes: float | None
    changes: tuple[str, ...]

    @classmethod
    def read(cls, images: str, minutes: float | None, changes: str) -> Wish:
        """What was typed.

        Raises:
            TesseraError: there are no images, or a change is none.
        """
        if not images.strip():
            raise TesseraError("name the images: a folder of photographs, or an archive of them")
        path = user_path(images.strip()).absolute()
        if not path.exists():
            raise TesseraError(f"{path} is not there. Name a folder of photographs of this machine")
        if not is_collection(str(path)):
            raise TesseraError(f"{path} holds no images that can be trained on")
        if minutes is not None and minutes < 0.01:
            raise TesseraError(f"{minutes:g} minutes are too few to train for")
        return cls(str(path), minutes, tuple(read_changes(changes)))

    def plan(self) -> PlannedRun:
        """Look at the images and decide what to train; nothing is written but what is measured.

        Raises:
            TesseraError: those of `plan_training`.
        """
        return plan_training(self.images, self.minutes, self.changes)


def read_changes(text: str) -> list[str]:
    """`key=value` words, on one line or on several.

    Raises:
        TesseraError: a word is none of them.

    Example:
        >>> read_changes("training.batch=8 network.model_channels=16")
        ['training.batch=8', 'network.model_channels=16']
    """
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise TesseraError(f"the changes cannot be read: {str(error).lower()}") from None
    for word in words:
        if not re.match(r"[A-Za-z_]", word) or "=" not in word:
            raise TesseraError(f"{word!r} is not of the form KEY=VALUE, like training.batch=8")
        if word.partition("=")[0] == "run.dir":
            raise TesseraError("run.dir: the run's folder is that of its name")
    return words


class Control:
    """What can be done to the runs of a folder."""

    def __init__(self, folder: StudioFolder, jobs: Jobs, runs: LiveRuns) -> None:
        self._folder, self._jobs, self._runs = folder, jobs, runs

    def stop(self, name: str | None) -> str:
        """Ask a run to finish its step, save and end; says what was done.

        Only a process that is known to be that of the run is told.

        Raises:
            TesseraError: nothing is at it, or the process is not known for sure.
        """
        run = self._runs.look(name)
        if not run.alive and run.state != "elsewhere":
            raise TesseraError(f"{run.name} is not being trained, so there is nothing to stop")
        if run.holder is not None and (not run.holder.here or run.holder.process == 0):
            raise TesseraError(
                f"{run.name}: {run.problem or 'its lock cannot be read'}. Stop it where it runs"
            )
        process, since = 0, None
        if run.holder is not None and not run.holder.ended:
            process, since = run.holder.process, run.holder.started
        elif run.job is not None:
            process, since = run.job.process, run.job.started
        try:
            sent = bool(process) and self._jobs.ask_to_stop(run.name, process, since)
        except PermissionError:
            raise TesseraError(
                f"{run.name}: process {process} belongs to another user, who can stop it"
            ) from None
        if not sent:
            raise TesseraError(
                f"{run.name}: process {process} cannot be told from others here, so it is left "
                f"alone. If it is the training, stop it in its terminal by Ctrl-C"
            )
        saves = "; it finishes the step and saves first" if run.state == "training" else ""
        return f"{run.name}: asked process {process} to stop{saves}"

    def resume(self, name: str | None, changes: str = "") -> str:
        """Go on with a run, with changes to its recipe; says what was done.

        Raises:
            TesseraError: something is at it, or a change that would make another run of it.
        """
        run, words = self._runs.look(name), read_changes(changes)
        if run.state == "broken":
            raise TesseraError(run.problem)
        if run.alive or run.state == "elsewhere":
            raise TesseraError(f"{run.name} is being trained already")
        path = self._folder.run(name)
        read_recipe(path, words)  # raises for what cannot change
        if run.state == "finished" and not words:
            raise TesseraError(
                f"{run.name} is finished. To train it longer, change training.images"
                + (" and training.minutes" if run.limit is not None else "")
            )
        job = self._jobs.start(run.name, ["train", "--resume", str(path), *words])
        return f"{run.name}: resumed, by process {job.process}"

    def start(self, wish: Wish, name: str, minutes: float) -> str:
        """Start a training from images as a run of this name; the name as it is listed.

        Args:
            minutes: of the plan that was shown.

        Raises:
            TesseraError: the name is taken or none.
        """
        path = self._folder.free(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = path.relative_to(self._folder.root).as_posix()
        self._jobs.start(shown, train_words(wish, str(path), minutes))
        return shown

    def suggestion(self, images: str) -> str:
        """A free name for a run on these images."""
        stem = re.sub(r"[^\w.+-]+", "-", user_path(images.strip() or "photos").name) or "photos"
        stem = stem.split(".")[0].strip("-") or "photos"
        for number in range(1, 1000):
            try:
                return self._folder.free(f"{stem}-{number}").name
            except TesseraError:
                continue
        return stem


def train_words(wish: Wish, run: str, minutes: float) -> Sequence[str]:
    """The command that trains a plan, as words after `tessera`."""
    return ["train", wish.images, run, *wish.changes, "--minutes", f"{minutes:g}"]
