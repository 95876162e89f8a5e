"""What is in a page, and whether it is one that a browser takes as it is meant."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"img", "meta", "line", "polyline", "circle", "rect"}


class Parts(HTMLParser):
    """Collects tags and text, and checks that what is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text, without the style and the script."""
        return " ".join(" ".join(self.words).split())

    def images(self, alt: str = "") -> list[dict[str, str | None]]:
        """The images whose description begins so."""
        return [a for tag, a in self.tags if tag == "img" and str(a["alt"]).startswith(alt)]


def code_of(page: str) -> list[str]:
    """The blocks of code."""
    return re.findall(r"<pre><code>(.*?)</code></pre>", page, re.S)


def loads_nothing(page: str) -> bool:
    """Whether a page names no address that a browser would open."""
    return not re.findall(r'(?:src|href|action)\s*=\s*"(?!data:)|url\(|@import|https?:', page)
