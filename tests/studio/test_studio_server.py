"""The studio as a process: what it says, and that it needs no more memory the longer it is used."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_case import needs_gradio
from training_case import tiny_recipe
from typer.testing import CliRunner

from tessera import errors
from tessera.cli import app
from tessera.errors import TesseraError
from tessera.training.trainer import Trainer

WARM, REQUESTS = 300, 1000
GROWTH = 32  # MB that 1,000 requests may add, of which each takes thousands of objects


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["studio", *words])


def test_without_gradio_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    error = run(str(tmp_path)).exception
    assert isinstance(error, TesseraError)
    assert "pip install" in str(error)
    assert "[studio]" in str(error)


@needs_gradio
def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = run(str(tmp_path), "--port", str(port), "--no-browser").exception
        assert isinstance(error, TesseraError)
        assert f"port {port} is taken" in str(error)
        assert f"--port {port + 1}" in str(error)


@needs_gradio
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--token", "short"], "--token: give at least 8"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: there is no such"),
    ],
)
def test_what_cannot_be_listened_with(tmp_path: Path, words: list[str], said: str) -> None:
    error = run(str(tmp_path), "--no-browser", *words).exception
    assert isinstance(error, TesseraError)
    assert said in str(error)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert "is a file" in str(run(str(tmp_path / "x")).exception)


class Client:
    """Asks as the page does."""

    def __init__(self, url: str) -> None:
        self._url = url
        config = json.loads(self._get("config"))
        self._functions = {
            one["api_name"]: (one["id"], len(one["inputs"])) for one in config["dependencies"]
        }

    def page(self) -> bytes:
        return self._get("")

    def enter(self, session: str) -> None:
        """What the page asks for first: which runs there are."""
        self._post("gradio_api/run/predict", self._body("watch", [None, None], session))
        self._post("gradio_api/run/predict", self._body("runs", [[]], session))

    def watch(self, name: str, session: str) -> Any:
        """A look at a run, as the timer takes it."""
        return self._post("gradio_api/run/predict", self._body("watch", [name, None], session))

    def compare(self, name: str, session: str) -> str:
        """Samples of a run, with the table."""
        self._post("gradio_api/queue/join", self._body("compare", [[name], "0-1"], session))
        with urllib.request.urlopen(
            f"{self._url}gradio_api/queue/data?session_hash={session}"
        ) as events:
            text = ""
            for line in events:
                text += line.decode()
                if "process_completed" in text or "close_stream" in text:
                    break
        return text

    def _body(self, name: str, data: list[Any], session: str) -> dict[str, Any]:
        return {"data": data, "fn_index": self._functions[name][0], "session_hash": session}

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._url + path) as answer:
            content: bytes = answer.read()
            return content


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A studio in a process of its own, over one tiny run."""
    preview = {"every_images": 96, "rows": 1, "columns": 4}
    Trainer(tiny_recipe(tmp_path, run={"preview": preview}), tmp_path / "runs" / "a").run()
    process = subprocess.Popen(
        [sys.executable, "-m", "tessera", "studio", str(tmp_path / "runs"), "--port", "0",
         "--no-browser", "--device", "cpu"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
    assert found is not None
    yield found[0], process
    process.kill()
    process.wait()


def memory_of(process: subprocess.Popen[str]) -> float:
    """Resident memory, MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.studio
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@needs_gradio
def test_a_thousand_requests_leave_memory_as_it_was(
    studio: tuple[str, subprocess.Popen[str]],
) -> None:
    url, process = studio
    client = Client(url)

    def ask(number: int) -> None:
        """Of ten requests seven look, two load the page, one samples; now and then anew."""
        session = f"visitor-{number // 50}"
        if number % 50 == 0:
            client.enter(session)
        if number % 10 < 7:
            answer = client.watch("a", session)
            assert "images seen" in json.dumps(answer) or number % 50
        elif number % 10 < 9:
            assert b"gradio" in client.page()
        else:
            assert "seed 1" in client.compare("a", session)

    for number in range(WARM):
        ask(number)
    before = memory_of(process)
    for number in range(WARM, WARM + REQUESTS):
        ask(number)
    assert memory_of(process) - before < GROWTH
    process.send_signal(signal.SIGINT)
    process.wait(60)
