"""What the claims share: options, a comparison of their arms, its table and pictures."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, markdown, record, show
from tessera import distributed
from tessera.comparing import report
from tessera.comparing.arms import Arm, CompareSettings
from tessera.comparing.compare import Comparison, compare_arms
from tessera.errors import TesseraError
from tessera.images import grid, save_png

COLUMNS = 10
Curves = Mapping[str, Sequence[tuple[float, float]]]


def parser_for(
    module: str, description: str | None, *, minutes: float = 20, samples: int = 2000
) -> argparse.ArgumentParser:
    """The options of claims that compare recipes, with the defaults of one."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.claims.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, minutes=minutes, samples=samples)
    parser.add_argument("--parallel", action="store_true", help="all at once, sharing the threads")
    parser.add_argument("--keep", type=Path, help="folder of the comparison, to go on with later")
    return parser


def add_options(parser: argparse.ArgumentParser, *, minutes: float, samples: int) -> None:
    """The options that all claims have."""
    parser.add_argument("--data", required=True, help="CIFAR-10 or other images")
    parser.add_argument("--reference", help="file of `tessera eval reference`; else made first")
    parser.add_argument("--minutes", type=float, default=minutes, help="training time of each arm")
    parser.add_argument("--samples", type=int, default=samples, help="images of each score")
    parser.add_argument("--batch", type=int, default=250, help="images sampled at once")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--no-record", action="store_true", help="leave RESULTS.md as it is")
    parser.add_argument(
        "--out", type=Path, default=RESULTS.parent, help="folder of pictures (default: benchmarks)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipes")


def run(main: Callable[[], None]) -> None:
    """The program, with the library's errors as a line for people."""
    try:
        with distributed.session():
            main()
    except TesseraError as error:
        raise SystemExit(f"error: {error}") from None


def changes(options: argparse.Namespace) -> tuple[str, ...]:
    """Those of all recipes: the images, and what the user says."""
    return (f"data.path={options.data}", *options.overrides)


def compared(arms: Sequence[Arm], options: argparse.Namespace, points: int = 1) -> Comparison:
    """Train, sample and score the arms as the options say; see `tessera compare`."""
    settings = CompareSettings(
        minutes=options.minutes,
        points=points,
        samples=options.samples,
        batch=options.batch,
        seed=options.seed,
        reference=options.reference or options.data,
    )
    with tempfile.TemporaryDirectory() as name:
        return compare_arms(arms, options.keep or name, settings, parallel=options.parallel)


def keep(module: str, title: str, note: str, made: Comparison, options: argparse.Namespace) -> None:
    """Print the table, leave the grids of its rows, and put all into RESULTS.md if asked to."""
    rows = report.table_rows(made)
    show(title, [*report.HEAD], rows)
    pictures = []
    for number, row in enumerate(made.rows):
        pictures.append(options.out / f"{module}-{number}.png")
        options.out.mkdir(parents=True, exist_ok=True)
        save_png(pictures[-1], grid(row[0].first[: 5 * COLUMNS], columns=COLUMNS))
    if options.no_record:
        return
    shown = " ".join(f"![{p.stem}]({p.name})" for p in pictures)
    at_once = " All trained at once." * options.parallel
    parts = [
        f"{note} {report.in_sentences(made)}{at_once} Rows from above: {shown}",
        markdown([*report.HEAD], rows),
    ]
    if made.settings.points > 1:
        parts.append(f"On the way:\n\n{markdown([*report.POINT_HEAD], report.point_rows(made))}")
    record(title, "\n\n".join(parts))


def plot(path: Path, curves: Curves, title: str, xlabel: str, xscale: str = "linear") -> None:
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
