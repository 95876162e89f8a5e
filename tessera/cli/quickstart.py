"""`tessera quickstart`: trains, samples and scores on bundled digits, and writes a report."""

from __future__ import annotations

from pathlib import Path

import typer

from tessera.cli.completing import offer_changes


def quickstart(
    overrides: list[str] | None = typer.Argument(
        None, help="Changes of the recipe: key.path=value ...", autocompletion=offer_changes
    ),
    out: Path | None = typer.Option(
        None, help="New folder for all that is made; by default quickstart, or quickstart-2, ..."
    ),
    seed: int = typer.Option(0, min=0, help="Seed of everything."),
    images: int | None = typer.Option(
        None, min=1, help="Images to train on, counting repetitions; by default the recipe's."
    ),
    digits: int | None = typer.Option(None, min=10, help="Use the first so many digits only."),
    samples: int | None = typer.Option(
        None, min=10, help="Images to make and score; by default half as many as digits."
    ),
) -> None:
    """Train on handwritten digits, sample, score, and write report.html: minutes on two cores."""
    from tessera import distributed
    from tessera.commands import tessera_command
    from tessera.files import atomic_file
    from tessera.quickstart.run import run
    from tessera.reports.sections import render

    out = out or _free_folder("quickstart")
    changes = [*(overrides or []), *([f"training.images={images}"] if images else [])]
    with distributed.session():
        result = run(out, seed=seed, overrides=changes, digits=digits, samples=samples)
    report = out / "report.html"
    with atomic_file(report) as file:
        file.write(render(result.report).encode())
    facts, distances = result.reference.extractor.facts, result.score.distances
    assert result.report.made is not None
    count = len(result.report.made.images)
    print(
        f"{result.recognised:.1%} of {count:,} samples are recognised as their digit, by "
        f"a classifier that is right on {facts.accuracy:.1%} of held-out real digits\n"
        f"{distances['samples']:.3g} is their Fréchet distance (in-domain classifier); other real "
        f"digits {distances['floor']:.3g}, digits with pixels in disorder "
        f"{distances['shuffled']:.3g}\n"
        f"{sum(result.seconds.values()):.0f} seconds in all, {result.seconds['training']:.0f} of "
        f"them to train on {result.images_seen:,} images; the report is {report}\n"
        f"more digits: {tessera_command()} sample {out}/run --seeds 0-63 --grid --out more-digits"
    )


def _free_folder(name: str) -> Path:
    """`name`, or with the first number that makes it a new one."""
    folder, number = Path(name), 1
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder
