"""What pages are made of: sections, tiles, tables, images and commands, in one file of HTML.

Nothing is loaded from elsewhere: the style, the script of the copy buttons and the pictures are
inside. Functions take plain text, which they escape, and give HTML; only bodies and cells are HTML.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from tessera.images import png_bytes


def document(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: of the window.
        body: HTML, part by part.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_file('page.css')}</style>\n</head>\n"
        "<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>{_file('page.js')}</script>\n</body>\n</html>\n"
    )


def _file(name: str) -> str:
    return resources.files("tessera.reports").joinpath(name).read_text(encoding="utf-8")


def header(title: str, text: str, tiles: Iterable[tuple[str, str, str]] = ()) -> str:
    """The head of a page.

    Args:
        text: a sentence below the title.
        tiles: figures that sum it all up: (kind, figure, what it is); the kind "good" is coloured.
    """
    cells = "\n".join(
        f'<div class="tile {escape(kind)}"><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for kind, value, note in tiles
    )
    cells = f'\n<div class="tiles">\n{cells}\n</div>' if cells else ""
    return f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(text)}</p>{cells}\n</header>"


def section(title: str, body: str, note: str = "") -> str:
    """A part of a page with a title, and a note in plain text above the body."""
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{text}\n{body}\n</section>"


def image(picture: NDArray[np.uint8], alt: str, kind: str = "") -> str:
    """A picture, uint8 [H, W, C] or [H, W]; the kind "wrong" is framed in red."""
    data = base64.b64encode(png_bytes(picture)).decode()
    css = f' class="{escape(kind)}"' if kind else ""
    return f'<img{css} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def row(name: str, cells: Iterable[str], kind: str = "") -> str:
    """HTML side by side, after a name."""
    css = f"row {escape(kind)}".strip()
    return f'<div class="{css}"><span>{escape(name)}</span>{"".join(cells)}</div>'


def picture_rows(cells: Iterable[Iterable[str]]) -> str:
    """HTML in rows of ten without names."""
    lines = (f'<div class="row plain">{"".join(line)}</div>' for line in cells)
    return "".join(lines)


def figure(caption: str, body: str, kind: str = "") -> str:
    """HTML below a caption."""
    css = f' class="{escape(kind)}"' if kind else ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{css}>{text}{body}</figure>"


def pair(left: str, right: str) -> str:
    """Two parts side by side, or one above the other where there is no room."""
    return f'<div class="pair">\n{left}\n{right}\n</div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    cells = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in rows)
    return f"<table>{cells}</table>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head; scrolls by itself where it is too wide."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    cells = "".join(
        "<tr>" + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>"
        for values in rows
    )
    return f'<div class="wide"><table class="head"><tr>{names}</tr>{cells}</table></div>'


def command(title: str, text: str) -> str:
    """A command, or a file, with a button that copies it."""
    head = f"<p>{escape(title)}</p>" if title else ""
    button = '<button class="copy" type="button">copy</button>'
    return f'{head}<div class="code">{button}<pre><code>{escape(text)}</code></pre></div>'
