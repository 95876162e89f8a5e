"""What lies in the studio's folder, how its runs are doing, and what can be done to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import tiny_pipeline
from training_case import tiny_recipe

from tessera import processes
from tessera.errors import TesseraError
from tessera.recipes.loading import dump_recipe
from tessera.recipes.text import write_yaml
from tessera.studio.control import Control, Wish, read_changes, train_words
from tessera.studio.folder import StudioFolder
from tessera.studio.jobs import Jobs
from tessera.studio.live import LiveRuns, newest_preview
from tessera.training.run_lock import LOCK, holder
from tessera.training.tracking import MetricsReader, read_metrics


def make_run(root: Path, name: str, lines: int = 3, **changes: Any) -> Path:
    """A run folder with a log of so many lines, 16 images apart."""
    path = root / name
    path.mkdir(parents=True)
    recipe = tiny_recipe(root.parent, **changes)
    (path / "recipe.yaml").write_text(write_yaml(dump_recipe(recipe)))
    log(path, lines)
    return path


def log(path: Path, lines: int) -> None:
    text = "".join(
        json.dumps(
            {"images": 16 * n, "loss_per_pixel": 1 / n, "seconds": 6 * n, "images_per_second": 8}
        )
        + "\n"
        for n in range(1, lines + 1)
    )
    (path / "metrics.jsonl").write_text(text)


def lock(path: Path, process: int, /, **changes: Any) -> None:
    content = {
        "host": "here", "process": process, "since": "noon",
        "namespace": processes.namespace(), "started": processes.started(process),
    }  # fmt: skip
    (path / LOCK).write_text(json.dumps(content | changes))


class Case:
    """A folder and everything that looks at it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = StudioFolder(root)
        self.jobs = Jobs(self.folder)
        self.runs = LiveRuns(self.folder, self.jobs)
        self.control = Control(self.folder, self.jobs, self.runs)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (tmp_path / "runs").mkdir()
    return Case(tmp_path / "runs")


@pytest.fixture
def sleeper() -> Any:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_runs_and_pipelines_are_found_and_nothing_else(case: Case, tmp_path: Path) -> None:
    make_run(case.root, "a")
    make_run(case.root, "deep/er/b")
    (case.root / "photos" / "cat").mkdir(parents=True)
    (case.root / "photos" / "config.json").write_text("{}")  # of something else
    (case.root / ".hidden").mkdir()
    tiny_pipeline().save(case.root / "pipe")
    outside = make_run(tmp_path, "outside")
    (case.root / "link").symlink_to(outside)
    found = {entry.name: (entry.is_run, entry.makes_images) for entry in case.folder.entries()}
    assert found == {"a": (True, False), "deep/er/b": (True, False), "pipe": (False, True)}
    os.utime(case.root / "a" / "metrics.jsonl", (2e9, 2e9))
    assert case.folder.entries()[0].name == "a"
    assert [e.name for e in StudioFolder(case.root / "a").entries()] == ["."]


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/etc", "link", "x\0y", "", None]
)
def test_no_name_leads_out(case: Case, tmp_path: Path, name: str | None) -> None:
    outside = make_run(tmp_path, "outside")
    (case.root / "link").symlink_to(outside)
    for act in (case.folder.entry, case.runs.look, case.control.stop, case.control.resume):
        with pytest.raises(TesseraError, match=r"is not in|nothing is chosen"):
            act(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../b", "no name for a run"), ("", "no name for a run"), (".b", "no name for a run"),
        ("b/c/d/e", "no name for a run"), ("a", "is there already"), ("a/b", "lies in another run"),
        ("-b/../..", "no name for a run"),
    ],
)  # fmt: skip
def test_names_of_new_runs(case: Case, name: str, words: str) -> None:
    make_run(case.root, "a")
    with pytest.raises(TesseraError, match=words):
        case.folder.free(name)
    assert case.folder.free("group/b-1") == case.root / "group" / "b-1"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(TesseraError, match="is a file"):
        StudioFolder(tmp_path / "x")


def test_states_of_a_run(case: Case, sleeper: Any) -> None:
    path = make_run(case.root, "a")
    look = case.runs.look
    assert (look("a").state, look("a").images, look("a").total) == ("stopped", 48, 96)
    assert look("a").seconds_left == pytest.approx(48 / 8)
    log(path, 6)
    assert (look("a").state, look("a").share, look("a").seconds_left) == ("finished", 1.0, None)
    log(path, 3)
    lock(path, sleeper.pid)
    assert look("a").state == "training"
    lock(path, sleeper.pid, namespace="other")
    assert look("a").state == "elsewhere"
    (path / LOCK).write_text("{")
    assert look("a").state == "elsewhere"
    lock(path, sleeper.pid, started=1)  # a later process with its number
    assert look("a").state == "killed"
    assert "ended without saving" in look("a").problem
    (path / LOCK).unlink()
    (path / "recipe.yaml").write_text("name: [")
    assert look("a").state == "broken"
    assert "recipe.yaml" in look("a").problem
    assert look("gone").state == "broken"
    assert "not there" in look("gone").problem


def test_a_time_that_is_over_is_an_end(case: Case) -> None:
    make_run(case.root, "a", training={"minutes": 0.3})
    run = case.runs.look("a")
    assert (run.state, run.limit, run.minutes) == ("finished", 0.3, 0.3)
    make_run(case.root, "b", training={"minutes": 0.4})
    run = case.runs.look("b")
    assert (run.state, run.share) == ("stopped", pytest.approx(0.75))
    assert run.seconds_left == pytest.approx(6)


def test_a_growing_log_is_read_once(tmp_path: Path) -> None:
    reader = MetricsReader(tmp_path)
    assert reader.read() == []
    log(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    assert [line["images"] for line in reader.read()] == [16, 32]
    with path.open("a") as file:
        file.write('{"images": 48, "loss')
        file.flush()
        assert [line["images"] for line in reader.read()] == [16, 32]
        file.write('": 1}\nnonsense\n')
        file.flush()
    assert [line["images"] for line in reader.read()] == [16, 32, 48]
    assert reader.read() == read_metrics(tmp_path)
    # What was read is not read again, unless the file is another one.
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    assert len(reader.read()) == 3
    os.replace(_with(tmp_path / "new", b'{"images": 1}\n' * 400), path)
    assert len(reader.read()) == 400
    path.write_bytes(b'{"images": 2}\n')
    assert reader.read() == [{"images": 2}]
    path.unlink()
    assert reader.read() == []


def _with(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_long_curves_are_thinned_to_the_last_point(case: Case) -> None:
    make_run(case.root, "a", lines=1500, training={"images": 100_000})
    (curve,) = case.runs.look("a").losses
    assert 300 <= len(curve.points) <= 400
    assert curve.points[-1] == (24_000.0, pytest.approx(1 / 1500))


def test_the_newest_preview(case: Case) -> None:
    path = make_run(case.root, "a")
    assert newest_preview(path) is None
    (path / "previews").mkdir()
    for images in (96, 32):
        (path / "previews" / f"{images:012d}.png").touch()
    found = newest_preview(path)
    assert found is not None
    assert found.name == "000000000096.png"


def test_only_the_process_of_the_run_is_stopped(case: Case, sleeper: Any) -> None:
    path = make_run(case.root, "a")
    with pytest.raises(TesseraError, match="nothing to stop"):
        case.control.stop("a")
    for changes in ({"namespace": "other"}, {"started": None}, {"process": 0}):
        lock(path, sleeper.pid, **changes)
        with pytest.raises(TesseraError, match=r"Stop it where it runs|is left alone"):
            case.control.stop("a")
    lock(path, sleeper.pid, started=1)
    with pytest.raises(TesseraError, match="nothing to stop"):
        case.control.stop("a")
    assert sleeper.poll() is None
    lock(path, sleeper.pid)
    assert f"asked process {sleeper.pid} to stop" in case.control.stop("a")
    assert sleeper.wait(60) == -signal.SIGTERM
    assert case.runs.look("a").state == "killed"


def test_signals_reach_only_who_began_then(sleeper: Any) -> None:
    began = processes.started(sleeper.pid)
    assert began is not None
    assert not processes.tell(sleeper.pid, began + 1, signal.SIGKILL)
    assert not processes.tell(sleeper.pid, None, signal.SIGKILL)
    assert not processes.tell(2**22 + 1, began, signal.SIGKILL)
    assert sleeper.poll() is None
    assert processes.tell(sleeper.pid, began, signal.SIGKILL)
    assert sleeper.wait(60) == -signal.SIGKILL
    assert not processes.tell(sleeper.pid, began, signal.SIGKILL)


def test_who_holds_a_run(tmp_path: Path, sleeper: Any) -> None:
    assert holder(tmp_path) is None
    lock(tmp_path, sleeper.pid)
    found = holder(tmp_path)
    assert found is not None
    assert (found.process, found.here, found.ended) == (sleeper.pid, True, False)
    sleeper.kill()
    sleeper.wait()
    assert found.ended


def test_what_is_refused_of_resuming(case: Case, sleeper: Any) -> None:
    path = make_run(case.root, "a", lines=6)
    with pytest.raises(TesseraError, match=r"finished\. To train it longer"):
        case.control.resume("a")
    with pytest.raises(TesseraError, match=r"cannot change network\.model_channels"):
        case.control.resume("a", "network.model_channels=16")
    with pytest.raises(TesseraError, match="not of the form KEY=VALUE"):
        case.control.resume("a", "--resume")
    lock(path, sleeper.pid)
    with pytest.raises(TesseraError, match="being trained already"):
        case.control.resume("a", "training.images=200")
    with pytest.raises(TesseraError, match="not there"):
        case.control.resume("b")
    assert case.jobs.all() == []


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tessera WORDS` prints the words, an error after --resume, and waits after photographs."""
    program = (
        "import sys, time\nprint(*sys.argv[2:], flush=True)\n"
        "if '--resume' in sys.argv: sys.exit('error: the disk is full')\ntime.sleep(600)\n"
    )
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "tessera"]
        return real([sys.executable, "-Sc", program, *command[2:]], **options)

    monkeypatch.setattr("tessera.studio.jobs.subprocess.Popen", popen)


def wait_for(done: Any) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def test_a_training_is_started_known_again_and_stopped(
    case: Case, tmp_path: Path, commands: None
) -> None:
    (tmp_path / "photos").mkdir()
    wish = Wish.read(str(tmp_path / "photos"), 5, "training.batch=8  # small\nema.0.x='a b'")
    name = case.control.start(wish, "group/b", 5)
    words = train_words(wish, str(case.root / "group" / "b"), 5)
    assert words[-4:] == ["training.batch=8", "ema.0.x=a b", "--minutes", "5"]
    assert (name, case.runs.names()) == ("group/b", ["group/b"])
    # Words are printed one by one.
    wait_for(lambda: case.runs.look(name).output == "train " + " ".join(words[1:]))
    assert case.runs.look(name).state == "preparing"
    with pytest.raises(TesseraError, match="at it already"):
        case.control.start(wish, "group/b", 5)
    # Another studio on the same folder knows it, too, though it is not its parent.
    other = Case(case.root)
    assert other.runs.look(name).state == "preparing"
    assert "asked process" in other.control.stop(name)
    wait_for(lambda: case.runs.look(name).state == "failed")
    assert "group/b" in case.runs.names()


def test_what_a_training_printed_last_is_shown(case: Case, commands: None) -> None:
    make_run(case.root, "a")
    assert "resumed, by process" in case.control.resume("a", "training.images=200")
    wait_for(lambda: case.runs.look("a").state == "failed")
    run = case.runs.look("a")
    assert run.problem == "the disk is full"
    assert run.output.startswith(f"train --resume {case.root / 'a'} training.images=200")


def test_damaged_notes_of_trainings_are_passed_over(case: Case) -> None:
    (case.root / ".studio").mkdir()
    (case.root / ".studio" / "a.json").write_text("{")
    (case.root / ".studio" / "b.json").write_text('{"name": "b"}')
    assert Case(case.root).jobs.all() == []


@pytest.mark.parametrize(
    ("images", "minutes", "changes", "words"),
    [
        ("", None, "", "name the images"),
        ("/nowhere/at/all", None, "", "is not there"),
        ("{root}", 0.001, "", "too few"),
        ("{root}", None, "--plan", "not of the form"),
        ("{root}", None, "run.dir=elsewhere", "that of its name"),
        ("{root}", None, "a='", "cannot be read"),
        ("{root}/notes.txt", None, "", "holds no images"),
    ],
)
def test_wishes_that_are_none(
    tmp_path: Path, images: str, minutes: float | None, changes: str, words: str
) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(TesseraError, match=words):
        Wish.read(images.format(root=tmp_path), minutes, changes)


def test_names_are_suggested(case: Case) -> None:
    make_run(case.root, "my-photos-1")
    assert case.control.suggestion("~/my photos/") == "my-photos-2"
    assert case.control.suggestion("") == "photos-1"


def test_changes_are_words() -> None:
    assert read_changes("a.b=1\n# no\nc='x y'") == ["a.b=1", "c=x y"]
