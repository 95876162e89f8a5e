"""What ends a training from outside, in words: full disks, no memory left, processes gone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tessera import distributed, memory
from tessera.errors import OutputError, TesseraError, TrainingError
from tessera.recipes.schema import TrainingConfig


@contextlib.contextmanager
def in_words(
    run_dir: Path, training: TrainingConfig, saved: Callable[[], Path | None]
) -> Iterator[None]:
    """Turn such errors of the block into one that names the last good checkpoint.

    Args:
        run_dir: folder of the run.
        training: section of its recipe.
        saved: the newest good checkpoint; None so far.

    Raises:
        TrainingError: says what to do, and how to go on.
    """
    try:
        yield
    except OutputError as error:
        raise TrainingError(f"{error}. {last_good(saved())}{_go_on(run_dir)}") from error
    except TesseraError:
        raise
    except Exception as error:
        if memory.used_up(error):
            less, change = _less_memory(training)
            raise TrainingError(
                f"the memory is used up. {less}. {last_good(saved())}{_go_on(run_dir, change)}"
            ) from error
        lost = distributed.lost_process(error)
        if lost is None:
            raise
        raise TrainingError(f"{lost}. {last_good(saved())}{_go_on(run_dir)}") from error


def last_good(checkpoint: Path | None) -> str:
    """A sentence without its full stop."""
    if checkpoint is None:
        return "No checkpoint had been written yet"
    return f"The last good checkpoint is {checkpoint}"


def _go_on(run_dir: Path, change: str = "") -> str:
    return f"; afterwards go on with: tessera train --resume {run_dir}{change}"


def _less_memory(training: TrainingConfig) -> tuple[str, str]:
    """What needs less memory, as a sentence and as a change of the recipe."""
    size = training.micro_batch or training.batch // distributed.world()
    smaller = next((n for n in range(size // 2, 0, -1) if training.batch % n == 0), None)
    if smaller is not None:
        return (
            f"Train on fewer images at once: {size} are a micro-batch on each device, and fewer "
            "give the same result",
            f" training.micro_batch={smaller}",
        )
    return (
        "One image at a time is too much for this device already: use a smaller network or a "
        "smaller data.resolution in a new run, a device with more memory, or several of them with "
        "training.parallel=fsdp",
        "",
    )
