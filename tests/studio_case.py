"""A studio that runs, and a browser that clicks through it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from data_files import write_folder
from numpy.typing import NDArray

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 1000 * int(os.environ.get("STUDIO_PATIENCE", "120"))
"""Milliseconds until something has not come; on a busy machine give more seconds."""

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="Gradio is not installed"
)
needs_browser = pytest.mark.skipif(
    not CHROMIUM or importlib.util.find_spec("playwright") is None,
    reason="Chromium or playwright is not installed",
)


def photographs(folder: Path, count: int = 12, side: int = 24) -> Path:
    """Two classes: light discs on blue, and on green."""
    files: dict[str, Any] = {}
    for index in range(count):
        files[f"sea/{index}.png"] = _disc(index, side, (40, 80, 190))
        files[f"wood/{index}.png"] = _disc(index + 50, side, (40, 140, 60))
    return write_folder(folder, files)


def _disc(seed: int, side: int, ground: tuple[int, int, int]) -> NDArray[np.uint8]:
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    center, radius = draws.uniform(0.3, 0.7, 2) * side, draws.uniform(0.15, 0.3) * side
    inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2
    image = np.where(inside[..., None], 230, np.array(ground)) + draws.normal(0, 6, (side, side, 3))
    return image.clip(0, 255).astype(np.uint8)


@contextlib.contextmanager
def running(root: Path, token: str | None = None) -> Iterator[str]:
    """A studio of a folder in a thread of this process; its address."""
    from tessera.studio.folder import StudioFolder
    from tessera.studio.serve import listening

    with listening(StudioFolder(root), host="127.0.0.1", port=0, token=token, device="cpu") as (
        server,
        address,
    ):
        ready = threading.Event()
        server.ready = ready.set
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert ready.wait(PATIENCE / 1000)
            yield address.url
        finally:
            server.stop()
            thread.join(PATIENCE / 1000)


class Visitor:
    """A page of the browser that remembers what went wrong in it."""

    def __init__(self, context: Any, url: str) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self._own = urlsplit(url).netloc
        self.page.on("pageerror", lambda error: self.wrong.append(f"page error: {error}"))
        self.page.on("console", self._console)
        self.page.on("requestfailed", self._failed)
        self.page.on("request", self._asked)
        self.page.on("response", self._answered)
        self.page.goto(url)
        self.page.wait_for_selector("#studio-tabs")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(f"console: {message.text}")

    def _failed(self, request: Any) -> None:
        # The page ends its own streams when it has heard what it waited for, or is loaded anew.
        if not ("/gradio_api/" in request.url and "ABORTED" in (request.failure or "")):
            self.wrong.append(f"failed: {request.url} {request.failure}")

    def _asked(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self._own:
            self.wrong.append(f"asked another machine: {request.url}")

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.wrong.append(f"{response.status}: {response.url}")

    def open(self, tab: str) -> None:
        """Turn to a page of the studio."""
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def choose(self, field: str, *names: str) -> None:
        """Choose from a drop-down list."""
        for name in names:
            self.page.click(f"#{field} input")
            self.page.get_by_role("option", name=name, exact=True).click()
        self.page.keyboard.press("Escape")

    def fill(self, field: str, text: str) -> None:
        """Type into a field, and leave it."""
        place = self.page.locator(f"#{field} textarea, #{field} input").first
        place.fill(text)
        place.blur()

    def press(self, button: str) -> None:
        """Press a button once it can be pressed."""
        self.page.click(f"button#{button}:not([disabled]), #{button} button:not([disabled])")

    def sees(self, field: str, words: str) -> str:
        """Wait until words stand in a part of the page; all that stands there."""
        place = self.page.locator(f"#{field}")
        place.filter(has_text=words).first.wait_for(state="visible")
        return str(place.first.inner_text())


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield made
        made.close()
