"""What the claims share: training for a given time, scores of samples, options, pictures."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tessera
from benchmarks.harness import RESULTS, device, markdown, record, show
from tessera import distributed
from tessera.comparing import timed
from tessera.comparing.timed import Scored, averaged, train_by_time
from tessera.errors import TesseraError
from tessera.files import write_json
from tessera.images import grid, save_png
from tessera.metrics.reference import Reference, open_reference
from tessera.pipelines.base import Pipeline
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.training.trainer import Trainer

COLUMNS = 10


def parser_for(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all claims have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.claims.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="CIFAR-10, as tessera reads it")
    parser.add_argument("--reference", help="file of `tessera eval reference`; else made first")
    parser.add_argument("--samples", type=int, default=2000, help="images of each score")
    parser.add_argument("--batch", type=int, default=250, help="images sampled at once")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--no-record", action="store_true", help="leave RESULTS.md as it is")
    parser.add_argument(
        "--out", type=Path, default=RESULTS.parent, help="folder of pictures (default: benchmarks)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipes")
    return parser


def run(main: Callable[[], None]) -> None:
    """The program, with the library's errors as a line for people."""
    try:
        with distributed.session():
            main()
    except TesseraError as error:
        raise SystemExit(f"error: {error}") from None


def timed_recipe(name: str, options: argparse.Namespace, *overrides: str) -> Recipe:
    """A recipe for training by the clock.

    The learning rate is constant, because the number of images that fit into the time is not known
    before; nothing is compiled, drawn or saved, because that would count as training.
    """
    return load_recipe(
        name,
        [
            *timed.TIMED,
            f"data.path={options.data}",
            f"training.seed={options.seed}",
            f"run.log_every_images={timed.NEVER}",
            *options.overrides,
            *overrides,
        ],
    )


def trained(recipe: Recipe, folder: Path, minutes: float) -> tuple[Pipeline, Trainer]:
    """The model after so many minutes of training, with averaged weights."""
    trainer = Trainer(recipe, folder)
    for _ in train_by_time(trainer, 60 * minutes):
        pass
    print(
        f"{folder.name}: {trainer.images_seen:,} images in {minutes:g} minutes on "
        f"{trainer.device_name}",
        flush=True,
    )
    return averaged(trainer), trainer


def start_arm(module: str, arm: str, threads: int, folder: Path) -> subprocess.Popen[str]:
    """The program of a claim again, as one arm (options `--arm` and `--folder`)."""
    again = ["-m", f"benchmarks.claims.{module}", *sys.argv[1:]]
    return subprocess.Popen(
        [sys.executable, *again, "--arm", arm, "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish_arm(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Its lines of JSON, once it has ended."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def run_arms(
    module: str, arms: Sequence[str], options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], int]:
    """All arms, in turn or with `--parallel` at once; their lines, and the threads of each."""
    at_once = max(1, len(arms)) if options.parallel else 1
    threads = max(1, options.threads // at_once)
    results: list[dict[str, Any]] = []
    running: list[subprocess.Popen[str]] = []
    for arm in arms:
        running.append(start_arm(module, arm, threads, folder))
        if not options.parallel:
            results += finish_arm(running.pop())
    for process in running:
        results += finish_arm(process)
    return results, threads


def add_arm_options(parser: argparse.ArgumentParser, arms: Sequence[str]) -> None:
    """The options of claims whose arms are processes."""
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder of the trained pipelines; arms that are in it are used as they are",
    )
    parser.add_argument("--parallel", action="store_true", help="all at once, sharing the threads")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--arm", choices=arms, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


@dataclass(frozen=True)
class Kept:
    """Trained arms.

    Attributes:
        pipes: their pipelines.
        images: that the models of each were trained on.
    """

    pipes: dict[str, Pipeline]
    images: dict[str, list[int]]


def keep_arm(folder: Path, arm: str, pipe: Pipeline, images: list[int]) -> None:
    """Save an arm's pipeline, and then the images that its models have seen."""
    pipe.save(folder / arm)
    write_json(folder / f"{arm}.json", images)


@contextlib.contextmanager
def kept_arms(module: str, arms: Sequence[str], options: argparse.Namespace) -> Iterator[Kept]:
    """All arms, trained unless they are in the folder of `--keep`."""
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        run_arms(
            module, [arm for arm in arms if not (folder / f"{arm}.json").exists()], options, folder
        )
        images = {arm: json.loads((folder / f"{arm}.json").read_bytes()) for arm in arms}
        yield Kept({arm: tessera.load(folder / arm).to(device()) for arm in arms}, images)


@dataclass(frozen=True)
class Case:
    """A row of a table: an arm, what the row is called, and the options of its sampling."""

    arm: str
    name: str
    sampling: dict[str, Any]


def score_arms(
    module: str,
    title: str,
    note: str,
    cases: Sequence[Case],
    kept: Kept,
    options: argparse.Namespace,
) -> None:
    """Sample and score all cases, print the table, and keep it with the grids if asked to."""
    reference = open_reference(options.reference or options.data, device=device())
    columns = ["model", "training images", "evaluations", "GFLOPs an image", "ms an image",
               "Fréchet distance", "recognised"]  # fmt: skip
    rows, pictures = [], []
    for number, case in enumerate(cases):
        pipe = kept.pipes[case.arm]
        result = scored(pipe, reference, options, **case.sampling)
        pictures.append(options.out / f"{module}-{number}.png")
        save_grid(pictures[-1], result.first)
        rows.append(
            [case.name, " + ".join(f"{n:,}" for n in kept.images[case.arm]),
             f"{result.evaluations:g}", f"{pipe.cost(**case.sampling).sample_flops / 1e9:.1f}",
             f"{result.seconds / options.samples * 1e3:.1f}",
             f"{result.known.fd_classifier:.3f}", percent(result.known.recognised)]
        )  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    show(title, columns, rows)
    if not options.no_record:
        said = (
            f"{note}{', all at once' * options.parallel}; {options.samples} samples of the same "
            f"seeds, timed with {options.batch} at once. Rows from above: "
            + " ".join(f"![{p.stem}]({p.name})" for p in pictures)
        )
        record(title, f"{said}\n\n{markdown(columns, rows)}")


def scored(
    pipe: Pipeline, reference: Reference, options: argparse.Namespace, **sampling: Any
) -> Scored:
    """Score as many samples as the options say, see `tessera.comparing.timed.scored`."""
    return timed.scored(pipe, reference, options.samples, options.batch, sampling)


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return "–" if value is None else f"{value:.1%}"


def save_grid(path: Path, images: NDArray[np.uint8], rows: int = 5) -> None:
    """A picture of the first images, one class in each column where there are ten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, grid(images[: rows * COLUMNS], columns=COLUMNS))


def plot(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    xlabel: str,
    xscale: str = "linear",
) -> None:
    """Distances of several arms against something, as a PNG file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)
    axes.set(
        xlabel=xlabel, ylabel="Fréchet distance (classifier)", yscale="log", xscale=xscale,
        title=title,
    )  # fmt: skip
    for axis in (axes.yaxis, *([axes.xaxis] if xscale == "log" else [])):
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5, 7)))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
