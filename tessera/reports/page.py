"""One HTML file that needs nothing else: style, script and pictures are inside.

Every function takes plain text, which it escapes, or HTML that another one of them made; which of
the two says the name: `body` and `cells` are HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera._version import __version__
from tessera.images import png_bytes, to_pil

_LARGEST = 192
"""Side of a picture in the page, pixels; twice of what a screen shows in a row of ten."""
_EXACT = 64
"""Pictures up to this side are PNG, without loss."""

# The page can load nothing, and says so to the browser: no address, no frame, no form.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Tile:
    """A number to be seen first, above a few words.

    Attributes:
        value: the number.
        note: what it is of.
        kind: "good", "bad" or "", its colour.
    """

    value: str
    note: str
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """An image in a gallery.

    Attributes:
        image: uint8 [H, W, C] or [H, W].
        alt: what it is, for those who do not see it.
        wrong: whether it is framed as a mistake.
    """

    image: NDArray[np.uint8]
    alt: str
    wrong: bool = False


def page(title: str, cells: Iterable[str]) -> str:
    """The whole document.

    Args:
        title: of the window.
        cells: the header and the sections, in their order.

    Example:
        >>> made = page("cats & dogs", [header("Cats & dogs", "Two classes."), section("How", "")])
        >>> "<title>cats &amp; dogs</title>" in made, "src=" in made
        (True, False)
    """
    files = resources.files("tessera.reports")
    style, script = (files.joinpath(f"page.{end}").read_text("utf-8") for end in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(cells)
        + f"\n<footer>Written by tessera {escape(__version__)}. This file needs nothing else."
        + f"</footer>\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def header(title: str, lead: str, tiles: Sequence[Tile] = ()) -> str:
    """The top of the page."""
    cells = "".join(
        f'<div class="tile {escape(tile.kind)}"><b>{escape(tile.value)}</b>'
        f"<span>{escape(tile.note)}</span></div>\n"
        for tile in tiles
    )
    numbers = f'\n<div class="tiles">\n{cells}</div>' if tiles else ""
    return f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>{numbers}\n</header>"


def section(title: str, body: str, note: str = "") -> str:
    """A card of the page; `note` explains what is in it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{text(note) if note else ''}{body}\n</section>"


def text(words: str) -> str:
    """A paragraph."""
    return f'<p class="note">{escape(words)}</p>\n'


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Rows of which the first cell is a name; numbers below a `head` stand to the right.

    A wide one is scrolled by itself, not with the page.
    """
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [f"<thead><tr>{top}</tr></thead>"] if head else []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    kind = "numbers" if head else "facts"
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def code(source: str, title: str = "", *, folded: bool = False) -> str:
    """Text to be copied, with a button that does it.

    Args:
        title: above it.
        folded: shown only when the reader asks.
    """
    block = (
        '<div class="code"><button type="button" class="copy" hidden>Copy</button>'
        f"<pre><code>{escape(source)}</code></pre></div>"
    )
    if folded:
        return f"<details><summary>{escape(title)}</summary>{block}</details>"
    return (f'<p class="what">{escape(title)}</p>' if title else "") + block


def picture(shown: Picture) -> str:
    """An image, as part of the page."""
    kind = ' class="wrong"' if shown.wrong else ""
    return f'<img{kind} alt="{escape(shown.alt)}" src="{_data(shown.image)}">'


def gallery(
    rows: Sequence[tuple[str, Sequence[Picture]]], title: str = "", heads: Sequence[str] = ()
) -> str:
    """Rows of images of one size behind their names; rows without names fill the width.

    Args:
        heads: of the names and of each column, above named rows; none by default.
    """
    columns = max((len(pictures) for _, pictures in rows), default=1)
    longest = max((len(name) for name, _ in rows), default=0)
    named = longest > 0
    top = "".join(f"<span>{escape(head)}</span>" for head in heads)
    made = [f'<div class="row heads">{top}</div>'] if heads else []
    for name, pictures in rows:
        cells = f'<span title="{escape(name)}">{escape(name)}</span>' if named else ""
        made.append(f'<div class="row">{cells}{"".join(map(picture, pictures))}</div>')
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    kind = "gallery named" if named else "gallery"
    label = f"{0.6 + 0.5 * min(longest, 10):.1f}em"
    style = f"--columns: {columns}; --label: {label}"
    return f'<figure class="{kind}" style="{style}">{caption}{"".join(made)}</figure>'


def strip(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Picture]]]) -> str:
    """Rows of images below common heads, which are scrolled by themselves where it is narrow.

    Args:
        heads: one for the names, and one above each column.
        rows: name and images; below each that is named as the last there is a gap.
    """
    first, *others = heads
    top = "".join(f"<span>{escape(head)}</span>" for head in others)
    lines = [f'<div class="row head"><span>{escape(first)}</span>{top}</div>']
    for name, pictures in rows:
        cells = "".join(map(picture, pictures))
        last = " last" if name == rows[-1][0] else ""
        lines.append(f'<div class="row{last}"><span>{escape(name)}</span>{cells}</div>')
    return f'<figure class="strip" style="--columns: {len(others)}">{"".join(lines)}</figure>'


def couples(pairs: Iterable[tuple[Picture, Picture, str]]) -> str:
    """Pictures two by two, with a note below each pair; as many in a row as there is room for."""
    cells = "".join(
        f"<figure>{picture(left)}{picture(right)}<figcaption>{escape(note)}</figcaption></figure>"
        for left, right, note in pairs
    )
    return f'<div class="couples">{cells}</div>'


def side_by_side(cells: Sequence[str]) -> str:
    """Figures beside each other, or below each other where it is narrow."""
    return f'<div class="pair">{"".join(cells)}</div>'


def legend(names: Sequence[tuple[str, str]]) -> str:
    """What the colours of a chart mean: (name, kind)."""
    keys = "".join(f'<span><i class="{kind}"></i>{escape(name)}</span>' for name, kind in names)
    return f'<p class="legend">{keys}</p>'


def items(lines: Iterable[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _data(image: NDArray[np.uint8]) -> str:
    """An image as an address: whole if it is small, else as large as it is shown."""
    height, width = image.shape[:2]
    if max(height, width) <= _EXACT:
        return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"
    small, buffer = to_pil(image), io.BytesIO()
    small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
