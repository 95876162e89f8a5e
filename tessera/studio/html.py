"""Pieces of the page that are shown and not clicked; everything that is text is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from tessera.errors import DataError
from tessera.images import open_image
from tessera.progress import duration, quantity
from tessera.reports import charts, page
from tessera.reports.making import Frame
from tessera.reports.sections import frames_strip
from tessera.studio.live import LiveRun, State, left_text

KINDS = "abcdefgh"
"""Colours of curves."""

_WORDS: Mapping[State, str] = {
    "preparing": "preparing", "training": "training", "stopping": "stopping, saves first",
    "reporting": "trained; samples and report are being made",
    "elsewhere": "in use elsewhere", "killed": "killed", "failed": "failed", "stopped": "stopped",
    "finished": "finished", "broken": "cannot be read",
}  # fmt: skip
_LARGEST_PREVIEW = 4_000_000  # bytes


def framed(*cells: str) -> str:
    """Cells in the studio's style."""
    inside = "".join(cells)
    return f'<div class="studio">{inside}</div>' if inside else ""


def head(folder: Path) -> str:
    """The top of the page."""
    return framed(f"<header><h1>tessera studio</h1><code>{escape(str(folder))}</code></header>")


def notice(text: str, kind: str = "bad") -> str:
    """A message; what stands in backquotes is shown as it is typed. "" shows nothing."""
    if not text:
        return ""
    words = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
    return framed(f'<p class="notice {kind}" role="status">{words}</p>')


def empty(title: str, text: str) -> str:
    """What stands where there is nothing yet, and what to do."""
    return framed(f'<div class="empty"><b>{escape(title)}</b><p>{escape(text)}</p></div>')


def status(run: LiveRun) -> str:
    """State, progress and the numbers of a run."""
    bar = (
        f'<div class="bar {run.state}"><i style="width:{run.share:.2%}"></i></div>'
        if run.total
        else ""
    )
    head = (
        f'<div class="state"><span class="dot {run.state}"></span><b>{_WORDS[run.state]}</b>'
        f"<span>{escape(run.name)}</span></div>"
    )
    problem = f'<p class="notice bad">{escape(run.problem)}</p>' if run.problem else ""
    return framed(head, bar, _tiles(run), problem)


def _tiles(run: LiveRun) -> str:
    """The numbers."""
    if not run.total:
        return ""
    moving = run.state in ("training", "stopping")
    share = f"of {run.total:,}" + (f", or {run.limit:g} minutes" if run.limit else "")
    tiles = [
        page.Tile(f"{run.images:,}", f"images seen, {share}"),
        page.Tile("–" if run.speed is None else quantity(run.speed), "images a second"),
        page.Tile(left_text(run) if moving else "–", "left"),
        page.Tile(duration(60 * run.minutes), "of training so far"),
    ]
    loss = run.last.get("loss_per_pixel")
    if loss is not None:
        tiles.insert(1, page.Tile(f"{loss:.4f}", "loss per pixel of late"))
    cells = "".join(
        f'<div class="tile"><b>{escape(t.value)}</b><span>{escape(t.note)}</span></div>'
        for t in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def curve(run: LiveRun) -> str:
    """The loss of a run."""
    if not run.losses:
        text = "The first line of the log comes after the first step." if run.alive else ""
        return empty("No loss yet", text)
    keys = [(series.name, series.kind) for series in run.losses]
    scores = [(name.replace("_", " "), f"{v:.4g}") for name, v in run.scores.items() if v]
    cells = [charts.lines(run.losses), page.legend(keys) if len(keys) > 1 else ""]
    cells += [page.table([(n, v) for n, v in scores if "/" not in n])]
    return framed(*cells)


def preview(path: Path | None) -> str:
    """A picture of samples, as part of the page."""
    if path is None:
        return empty("No preview yet", "Previews are made now and then while a run is trained.")
    try:
        if path.stat().st_size > _LARGEST_PREVIEW:
            return notice(f"{path} is too large to be shown here", "quiet")
        data = path.read_bytes()
        with open_image(data, str(path)):
            pass
    except (OSError, DataError):
        return notice(f"{path.name} cannot be shown", "quiet")
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    images = int(path.stem) if path.stem.isdigit() else 0
    caption = f"samples after {images:,} images, always of the same seeds"
    return framed(
        f'<figure class="preview"><img alt="{caption}" src="{source}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def output(text: str) -> str:
    """What a training printed last."""
    if not text:
        return ""
    return framed(f"<details><summary>Its output</summary><pre>{escape(text)}</pre></details>")


def plan(rows: Sequence[tuple[str, str, str]]) -> str:
    """The table of what would be trained."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td><td>{escape(why)}</td></tr>"
        for name, value, why in rows
    )
    return framed(f'<div class="wide"><table class="plan">{lines}</table></div>')


def making(frames: Sequence[Frame], share: float) -> str:
    """The denoising, and how far it is."""
    bar = f'<div class="bar training"><i style="width:{share:.2%}"></i></div>' if share < 1 else ""
    return framed(bar, frames_strip(frames) if frames else "")


def facts(rows: Mapping[str, str]) -> str:
    """Names and values."""
    return framed(page.table([*rows.items()])) if rows else ""


def compared(runs: Sequence[LiveRun]) -> str:
    """The curves of several runs in one plot, and their numbers in a table."""
    series, keys = [], []
    for run, kind in zip(runs, KINDS, strict=False):
        if run.losses:
            series.append(charts.Series(run.name, run.losses[0].points, kind))
            keys.append((run.name, kind))
    scored = list(dict.fromkeys(name for run in runs for name in run.scores if "/" not in name))[:4]
    head = ["run", "state", "network", "images", "minutes", "images/s", "loss", "held-out", *scored]
    rows = [
        [
            run.name,
            _WORDS[run.state].partition(",")[0].partition(";")[0],
            "–" if run.recipe is None else run.recipe.network.kind,
            f"{run.images:,}",
            f"{run.minutes:.1f}",
            "–" if run.speed is None else quantity(run.speed),
            _number(run.last.get("loss_per_pixel")),
            _number(run.scores.get("validation/loss_per_pixel")),
            *(_number(run.scores.get(name)) for name in scored),
        ]
        for run in runs
    ]
    return framed(
        page.legend(keys) + charts.lines(series) if series else "",
        page.table(rows, head),
        page.text(
            "Losses of different networks compare; of different objectives, noise levels or views "
            "they do not."
        ),
    )


def grids(rows: Sequence[tuple[str, Sequence[page.Picture]]], seeds: Sequence[int]) -> str:
    """Samples of the same seeds, a row for each run."""
    return framed(page.gallery(rows, heads=["seed", *map(str, seeds)]))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
