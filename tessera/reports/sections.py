"""The report of a run as a page: what was measured, in words, pictures and charts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tessera.progress import human, quantity, time_text
from tessera.recipes.loading import dump_recipe
from tessera.recipes.text import write_yaml
from tessera.reports.advice import advice
from tessera.reports.charts import Mark, groups, lines, scale, spread
from tessera.reports.copies import FEWEST_HELD_OUT, Share, wilson
from tessera.reports.losses import QUARTERS, Quartiles, curves, quarter_curves
from tessera.reports.making import Frame
from tessera.reports.measured import CopyCheck, RunReport, shown_columns
from tessera.reports.page import (
    Picture,
    Tile,
    code,
    couples,
    gallery,
    header,
    items,
    legend,
    page,
    section,
    side_by_side,
    strip,
    table,
    text,
)
from tessera.reports.scores import ROWS, Ladder

_NAMES = {
    "samples": "samples",
    "floor": "other real images",
    "blurred": "real, without detail",
    "shuffled": "real, pixels in disorder",
}
_KINDS = {"samples": "samples", "floor": "floor", "blurred": "middle", "shuffled": "ceiling"}


def render(report: RunReport) -> str:
    """The report as HTML, with its pictures inside."""
    cells = [
        _head(report), _comparison(report), _course(report), _distances(report),
        _copies(report), _training(report), _took(report), _go_on(report), _missing(report),
    ]  # fmt: skip
    return page(f"tessera: {report.title}", filter(None, cells))


# ------------------------------------------------------------------------------------- the header


def _head(report: RunReport) -> str:
    pipe, seconds = report.subject.pipeline, _seconds(report)
    parameters = sum(p.numel() for p in pipe.model.parameters())
    trained = f", trained on {pipe.images_seen:,} images" if pipe.images_seen else ""
    trained += f" in {time_text(seconds)}" if trained and seconds is not None else ""
    about = pipe.recipe.description.rstrip(".")
    about = about[:1].upper() + about[1:]
    lead = f"{about}. A {pipe.kind} model of {quantity(parameters)} parameters{trained}."
    return header(report.title, lead.removeprefix(". "), _tiles(report))


def _tiles(report: RunReport) -> list[Tile]:
    tiles = []
    if report.recognised is not None and report.made is not None and report.judge is not None:
        facts = report.judge.reference.extractor.facts
        tiles.append(
            Tile(
                f"{report.recognised:.1%}",
                f"of {len(report.made.images):,} samples are taken for their class; of real images "
                f"the classifier gets {facts.accuracy:.1%} right",
                "good",
            )
        )
    if report.ladders:
        first = report.ladders[0]
        tiles.append(
            Tile(
                f"{first.distances['samples']:.3g}",
                f"distance from real images ({first.features}); other real images "
                f"{first.distances['floor']:.3g}",
            )
        )
    share = None if report.copies is None else report.copies.standing_out
    if share is not None:
        tiles.append(
            Tile(
                f"{share.of_samples:.1%}",
                "of the samples stand as close to one training image as "
                f"{share.of_held_out:.0%} of images that are new for sure",
                "bad" if share.more else "good",
            )
        )
    seconds = _seconds(report)
    if seconds is not None:
        tiles.append(Tile(time_text(seconds), f"of training, {_speed(report)} images a second"))
    elif report.cost is not None:
        note = f"to make one image, in {report.cost.evaluations} evaluations"
        tiles.append(Tile(human(report.cost.sample_flops, "FLOP"), note))
    return tiles


def _last(report: RunReport, name: str) -> float | None:
    """The newest value in the log of the run."""
    found = (line[name] for line in reversed(report.subject.metrics) if line.get(name) is not None)
    return next(found, None)


def _seconds(report: RunReport) -> float | None:
    return _last(report, "seconds")


def _speed(report: RunReport) -> str:
    seconds, images = _seconds(report), _last(report, "images")
    return "no" if not seconds or not images else f"{images / seconds:.3g}"


# ---------------------------------------------------------------------------------------- samples


def _comparison(report: RunReport) -> str:
    made = report.made
    if made is None:
        return ""
    columns = shown_columns(report)
    if report.classes:
        labels = made.labels
        assert labels is not None
        rows = {c: np.flatnonzero(labels == c)[:columns] for c in report.classes}
        ours = [(_class(report, c), _samples(report, rows[c])) for c in report.classes]
        theirs = [
            (_class(report, c), _pictures(report.real.get(c), f"real {_class(report, c)}"))
            for c in report.classes
        ]
    else:
        every = np.arange(len(made.images))[: columns**2]
        ours = [("", _samples(report, part)) for part in _split(every, columns)]
        real = report.real.get(-1)
        chosen = [] if real is None else _split(np.arange(len(real)), columns)
        theirs = [("", _pictures(real[part], "real")) for part in chosen if real is not None]
    figures = [gallery(theirs, "real images")] if any(shown for _, shown in theirs) else []
    figures.append(gallery(ours, "samples"))
    return section("Real and made", side_by_side(figures), _comparison_note(report))


def _split(rows: NDArray[np.int64], columns: int) -> list[NDArray[np.int64]]:
    return np.split(rows, range(columns, len(rows), columns))


def _class(report: RunReport, label: int) -> str:
    names = report.subject.pipeline.class_names
    return names[label] if names and label < len(names) else str(label)


def _samples(report: RunReport, rows: NDArray[np.int64]) -> list[Picture]:
    made, predicted = report.made, report.predicted
    assert made is not None
    labels = made.labels
    pictures = []
    for row in rows:
        name = "made" if labels is None else f"made {_class(report, int(labels[row]))}"
        wrong = labels is not None and predicted is not None and predicted[row] != labels[row]
        pictures.append(Picture(made.images[row], name, bool(wrong)))
    return pictures


def _pictures(images: NDArray[np.uint8] | None, alt: str) -> list[Picture]:
    return [] if images is None else [Picture(image, alt) for image in images]


def _comparison_note(report: RunReport) -> str:
    made = report.made
    assert made is not None
    options = ", ".join(f"{k}={v}" for k, v in report.options.items() if k != "start_from")
    asked = f", with {options}" if options else ""
    note = f"The first of {len(made.images):,} samples{asked}, none picked."
    classes = report.subject.pipeline.model.num_classes
    if len(report.classes) < classes:
        note += f" They are of {len(report.classes)} of the {classes:,} classes."
    if report.predicted is not None and report.judge is not None:
        wrong = int((report.predicted != made.labels).sum())
        facts = report.judge.reference.extractor.facts
        note += (
            f" {wrong} of all are taken for another class than they were asked to be (framed where "
            f"shown), by a small classifier of these images that is itself wrong on "
            f"{1 - facts.accuracy:.1%} of {facts.held_out:,} real ones that it was not trained on."
        )
    return note


def _course(report: RunReport) -> str:
    frames = report.frames
    if not frames:
        return ""
    note = (
        "From noise to images, at a few of the steps. Above the state after a step, below what the "
        "network takes the image to be."
        if frames[0].sigma is not None
        else "Parts of the image (tokens) are made in an order drawn at random; grey is not made "
        "yet."
    )
    return section("How they come about", frames_strip(frames), note)


def frames_strip(frames: Sequence[Frame]) -> str:
    """The making of some samples as a strip: their states and, below each, where it leads."""
    noise = frames[0].sigma is not None
    heads = ["σ" if noise else "done"]
    heads += [f"{f.sigma:.2g}" if f.sigma is not None else f"{f.share:.0%}" for f in frames]
    rows = []
    for index in range(len(frames[0].noisy)):
        state = [Picture(f.noisy[index], f"state {index}") for f in frames]
        rows.append(("state" if noise else "tokens", state))
        guess = [f.denoised for f in frames if f.denoised is not None]
        if guess:
            rows.append(("guess", [Picture(g[index], f"guess {index}") for g in guess]))
    return strip(heads, rows)


# ----------------------------------------------------------------------------------------- scores


def _distances(report: RunReport) -> str:
    if not report.ladders:
        return ""
    body = [_ladder(one) for one in report.ladders]
    n = report.ladders[0].n
    note = (
        f"Fréchet distances of {n:,} samples from {report.ladders[0].n_reference:,} real images; "
        "smaller is closer. As many other real images are the floor; above lie the same images "
        "without detail (a quarter of the resolution), and with all pixels in disorder. They "
        "compare models on these images, and are not FID."
    )
    if any(one.distances["samples"] < one.distances["floor"] for one in report.ladders):
        note += (
            " Samples below the floor are not better than real: they vary less, as with guidance, "
            "and so few of them then look closer."
        )
    if n <= max(one.dim for one in report.ladders):
        note += " So few samples make all of these distances large; more: --samples NUMBER."
    return section("How far from real", "".join(body), note)


def _ladder(one: Ladder) -> str:
    marks = [Mark(_NAMES[name], one.distances[name], _KINDS[name]) for name in ROWS]
    marks.sort(key=lambda mark: mark.value)
    about = (
        "Which colours lie where; blind for what is in a picture."
        if one.features == "colour and layout"
        else "What a small classifier of these images sees in them."
    )
    made = text(f"{one.features}, {one.dim} numbers an image. {about}") + scale(marks)
    if one.precision is None or one.recall is None:
        return made
    rows = [
        ("looks real (precision)", *(f"{one.precision[name]:.0%}" for name in ROWS)),
        ("variety (recall)", *(f"{one.recall[name]:.0%}" for name in ROWS)),
    ]
    return made + table(rows, ["", *(_NAMES[name] for name in ROWS)])


# ----------------------------------------------------------------------------------------- copies


def _copies(report: RunReport) -> str:
    found = report.copies
    if found is None:
        return ""
    unit = "grey levels" if found.pixels else "units of latents"
    body = text(_verdict(found))
    series = [("samples", found.samples.relative.tolist(), "a")]
    if found.held_out is not None and found.near is not None and found.standing_out is not None:
        near, share = found.near, found.standing_out
        rows = [
            _share_row(f"stands out (at most {share.threshold:.2f})", share),
            _share_row(f"is near (at most {near.threshold:.3g} {unit})", near),
        ]
        body += table(rows, ["the nearest image", "of samples", "of held-out images"])
        series.append(("held-out images", found.held_out.relative.tolist(), "b"))
    mark = None if found.standing_out is None else found.standing_out.threshold
    body += legend([(name, kind) for name, _, kind in series])
    body += spread(series, mark, "distance to the nearest, of that to the 50 nearest")
    body += text(
        "The closest pairs, a sample to the left and its nearest training image to the right, by "
        f"how much that stands out; below them this number, and the distance in {unit}."
    )
    body += couples(
        (
            Picture(one.sample, "sample"),
            Picture(one.training, "nearest training image"),
            f"{one.relative:.2f} · {one.distance:.3g}",
        )
        for one in found.pairs
    )
    return section("Are they copies?", body, _copies_note(found))


def _copies_note(found: CopyCheck) -> str:
    part = "" if found.searched == found.trained_on else f" of {found.trained_on:,}, at random,"
    what = "pictures averaged to at most 16 x 16 pixels" if found.pixels else "latents likewise"
    return (
        f"For each sample the nearest of {found.searched:,}{part} training images was searched, "
        f"by the root mean square difference of {what}. Blurred or plain pictures are near to "
        "many images, so it is told, too, how far the nearest stands out from the 50 nearest: 1 "
        "is not at all, 0 is a copy. It finds copies of whole images, not of parts of them."
    )


def _verdict(found: CopyCheck) -> str:
    share = found.standing_out
    if share is None:
        return (
            f"How near is near cannot be said: it needs {FEWEST_HELD_OUT} or more images that were "
            "not trained on. Name some (--held-out IMAGES), or train with data.held_out=0.05; "
            "other training images are no measure."
        )
    low, high = wilson(share.samples, share.n)
    told = (
        f"{share.of_samples:.1%} of the samples ({low:.1%} to {high:.1%}) stand as close to one "
        f"training image as {share.of_held_out:.1%} of {share.m:,} held-out images do."
    )
    if share.more:
        return f"{told} That is more than chance explains: look at the pairs below."
    return f"{told} That is no more than new images of the same kind would."


def _share_row(name: str, share: Share) -> tuple[str, ...]:
    """Of both sets the share, and its 95% interval."""
    cells = [name]
    for count, total in ((share.samples, share.n), (share.held_out, share.m)):
        low, high = wilson(count, total)
        cells.append(f"{count / total:.1%} ({low:.1%} – {high:.1%})")
    return tuple(cells)


# --------------------------------------------------------------------------------------- training


def _training(report: RunReport) -> str:
    metrics = report.subject.metrics
    overall, quarters = curves(metrics), quarter_curves(metrics)
    body = ""
    if overall:
        body += legend([(one.name, one.kind) for one in overall]) + lines(overall)
    if quarters:
        body += text("The same by quarters of the noise levels that are drawn in training:")
        body += legend([(one.name, one.kind) for one in quarters])
        body += lines(quarters, what="loss per pixel by quarters of the noise levels")
    found = [one for one in report.quartiles if one.values]
    if found:
        titles = [_of(one) for one in found]
        series = [
            (title, one.values, "abcd"[index % 4])
            for index, (title, one) in enumerate(zip(titles, found, strict=True))
        ]
        body += text(
            "At the end, by quarters of the noise levels" + _counted(report)
            + ". Where it is higher on held-out images than in training, the model has learned its "
            "images by heart."
        )  # fmt: skip
        body += legend([(title, kind) for title, _, kind in series])
        body += groups(QUARTERS, series, "loss per pixel")
    rows = [
        (_of(one), *(_number(value) for value in one.values or [None] * 4), _number(one.mean))
        for one in report.quartiles
    ]
    if rows:
        body += table(rows, ["loss per pixel", *QUARTERS, "mean"])
    if not body:
        return ""
    return section("Loss", body, _training_note(report))


def _of(one: Quartiles) -> str:
    """Which model and images a loss is of."""
    return f"{one.name}, {one.of}" if one.name else one.of


def _counted(report: RunReport) -> str:
    counts = {one.images for one in report.quartiles if one.images is not None}
    return f" (averaged weights, measured on {max(counts):,} images)" if counts else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _training_note(report: RunReport) -> str:
    seen, training = _last(report, "images"), report.subject.training
    note = ""
    if seen is not None:
        note = f"{int(seen):,} images seen"
        if training is not None:
            note += f", {len(training):,} different ones about {seen / len(training):.3g} times"
        note += ". "
    return note + (
        "The error that is left when the noise is taken away, as the training weighs it; it stays "
        "far from zero, because noise cannot be guessed."
    )


# ----------------------------------------------------------------------------------- what it took


def _took(report: RunReport) -> str:
    pipe, cost = report.subject.pipeline, report.cost
    recipe = pipe.recipe
    training, data = recipe.training, recipe.data
    channels, height, width = report.subject.image_shape
    images = report.subject.training
    classes = f", {pipe.model.num_classes:,} classes" if pipe.model.num_classes else ""
    count = "" if images is None else f"{len(images):,} images, "
    rows = [
        ("data", f"{count}{width} x {height}, {'grey' if channels == 1 else 'colour'}{classes}"),
        ("network", f"{recipe.network.kind}, "
                    f"{sum(p.numel() for p in pipe.model.parameters()):,} parameters"),
        ("trained on", f"{pipe.images_seen:,} images, batches of {training.batch}, "
                       f"{training.precision}"),
        ("averaged weights", f"half-life {pipe.ema} images" if pipe.ema.isdigit() else pipe.ema),
        ("sampler", recipe.sampling.kind),
        ("seed", f"{training.seed} of the training, {report.seed} of the samples here"),
    ]  # fmt: skip
    if not recipe.codec.of_pixels:
        channels, side, _ = recipe.shape
        rows.insert(1, ("modelled as", f"latents {side} x {side}, {channels} channels"))
    if data.xflip:
        rows.insert(1, ("mirrored copies", "yes"))
    seconds, memory = _seconds(report), _last(report, "memory_gb")
    if seconds is not None:
        rows.append(("time of training", f"{time_text(seconds)}, {_speed(report)} images a second"))
    if memory is not None:
        rows.append(("peak memory", f"{memory:.3g} GB"))
    if cost is not None:
        rows += [
            ("training, an image", human(cost.train_flops, "FLOP")),
            ("training, all so far", human(cost.train_flops * pipe.images_seen, "FLOP")),
            ("sampling, an image", f"{human(cost.sample_flops, 'FLOP')}, {cost.evaluations} "
                                   "evaluations of the network"),
        ]  # fmt: skip
    if len(report.subject.models()) > 1:  # of which each has its own
        rows = [row for row in rows if row[0] != "training, all so far"]
    facts = table(rows)
    return section("What it took", facts + _recipes(report))


def _recipes(report: RunReport) -> str:
    """The recipe of each model, in full."""
    return "".join(
        code(
            write_yaml(dump_recipe(pipe.recipe)),
            f"The recipe, all of it{f', of {name}' if name else ''}",
            folded=True,
        )
        for name, pipe in report.subject.models()
    )


def _go_on(report: RunReport) -> str:
    return section("Go on", "".join(code(line, title) for title, line in advice(report)))


def _missing(report: RunReport) -> str:
    missing = report.subject.missing
    return section("Not in this report", items(missing)) if missing else ""
