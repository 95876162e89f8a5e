"""`tessera sample` end to end on a tiny pipeline: files, resuming, errors, several processes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork, fork_ranks
from PIL import Image
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

from tessera.cli import app
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.generate import Job, generate_folder, read_images, share_of_seeds
from tessera.pipelines.loading import load


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny_pipeline().save(folder)
    return str(folder)


def run(*arguments: object) -> str:
    """The output of `tessera sample`; errors of the user's are raised."""
    result = CliRunner().invoke(app, ["sample", *map(str, arguments), "--device", "cpu"])
    if isinstance(result.exception, TesseraError | MemoryError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def pngs(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


def test_pngs(pipeline: str, tmp_path: Path) -> None:
    output = run(pipeline, "--seeds", "0-4,1007", "--out", tmp_path / "s")
    assert re.search(r"6 images in .* images/s, 5 network evaluations per image", output)
    assert str(tmp_path / "s") in output
    files = pngs(tmp_path / "s")
    assert sorted(files) == [*(f"00000{seed}.png" for seed in range(5)), "001007.png"]
    expected = tiny_pipeline().sample("0-4,1007")
    for (_, data), image in zip(sorted(files.items()), expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    labels = json.loads((tmp_path / "s" / "dataset.json").read_text())["labels"]
    assert [name for name, _ in labels] == sorted(files)
    assert [label for _, label in labels] == tiny_pipeline().labels("0-4,1007").tolist()


@pytest.mark.parametrize("batch", [1, 5])
def test_batch_sizes_give_the_same_images(pipeline: str, tmp_path: Path, batch: int) -> None:
    # In float32 on a CPU the PNGs were equal byte for byte wherever this was tried; but libraries
    # may sum in another order for another batch size, so one grey level is allowed.
    run(pipeline, "--seeds", "0-15", "--batch", 16, "--out", tmp_path / "whole")
    run(pipeline, "--seeds", "0-15", "--batch", batch, "--out", tmp_path / "parts")
    for name in pngs(tmp_path / "whole"):
        one, other = (
            np.asarray(Image.open(tmp_path / kind / name)).astype(int)
            for kind in ("whole", "parts")
        )
        assert abs(one - other).max() <= 1


def test_resuming_makes_only_what_is_missing(pipeline: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run(pipeline, "--seeds", "0-5", "--out", folder)
    before = pngs(folder)
    (folder / "000003.png").unlink()
    (folder / "000001.png").write_bytes(b"kept")
    output = run(pipeline, "--seeds", "0-6", "--out", folder)
    assert "2 images in" in output
    assert "5 images were there already" in output
    after = pngs(folder)
    assert after.pop("000001.png") == b"kept"
    assert len(after) == 6
    assert all(after[name] == before[name] for name in after if name in before)
    assert "7 images were there already" in run(pipeline, "--seeds", "0-6", "--out", folder)


def test_images_of_other_settings_are_not_mixed(pipeline: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run(pipeline, "--seeds", "0", "--out", folder)
    for options, difference in (
        (["--steps", "4"], "sampler.steps: 3 there, 4 now"),
        (["--class", "bee"], "class: none there, 1 now"),
        (["--guidance", "2"], r"guidance: 1.0 there, 2.0 now"),
        (["--precision", "bf16"], "precision: fp32 there, bf16 now"),
    ):
        with pytest.raises(TesseraError, match=difference + r"\). Choose another folder"):
            run(pipeline, "--seeds", "1", "--out", folder, *options)
    assert list(pngs(folder)) == ["000000.png"]
    (folder / "sampling.json").unlink()
    with pytest.raises(TesseraError, match=r"holds no sampling.json.*000000.png is there"):
        run(pipeline, "--seeds", "0", "--out", folder)


@pytest.mark.parametrize("options", [[], ["--format", "npz"], ["--format", "grid"]])
def test_folders_of_others_stay_as_they_are(
    pipeline: str, tmp_path: Path, options: list[str]
) -> None:
    for name, file in (("photos", "dataset.json"), ("run", "recipe.yaml"), ("docs", "a.txt")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / file).write_text("x")
        with pytest.raises(TesseraError, match=rf"is not empty.*\({file} is there\)"):
            run(pipeline, "--seeds", "0", "--out", folder, *options)
        assert [path.name for path in folder.iterdir()] == [file]
        assert (folder / file).read_text() == "x"
    for name in ("empty", "hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "hidden" / ".DS_Store").write_text("x")
    for name in ("empty", "hidden", "new"):
        run(pipeline, "--seeds", "0", "--out", tmp_path / name, *options)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TesseraError, match="is a file"):
        run(pipeline, "--seeds", "0", "--out", tmp_path / "file", *options)


@pytest.mark.parametrize(
    ("out", "options", "file"),
    [
        ("g.png", [], "g.png"),
        ("s.npz", [], "s.npz"),
        ("s", ["--format", "npz"], "s/samples.npz"),
        ("s", ["--grid"], "s-grid.png"),
        ("s", ["--trajectory", "t.gif"], "t.gif"),
    ],
)
def test_files_are_replaced_when_told(
    pipeline: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    options: list[str],
    file: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(TesseraError, match=rf"{file} exists already.*--overwrite to replace"):
        run(pipeline, "--seeds", "0-1", "--out", out, *options)
    assert path.read_text() == "mine"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path.absolute()]
    run(pipeline, "--seeds", "0-1", "--out", out, *options, "--overwrite")
    assert path.read_bytes() != b"mine"


def test_nothing_to_overwrite(pipeline: str, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="images in a folder are never replaced"):
        run(pipeline, "--seeds", "0", "--out", tmp_path / "s", "--overwrite")


def test_names_of_files_make_no_folders(pipeline: str, tmp_path: Path) -> None:
    for name in ("x.jpg", "x.zip", "x.webp"):
        with pytest.raises(TesseraError, match=r"cannot be written.*\.npz or \.png.*--format png"):
            run(pipeline, "--seeds", "0", "--out", tmp_path / name)
        with pytest.raises(TesseraError, match=r"cannot be written. End the name in \.npz"):
            run(pipeline, "--seeds", "0", "--out", tmp_path / name, "--format", "npz")
    assert not list(tmp_path.iterdir())
    run(pipeline, "--seeds", "0", "--out", tmp_path / "x.jpg", "--format", "png")
    run(pipeline, "--seeds", "0", "--out", tmp_path / "guided-1.5")
    assert len(pngs(tmp_path)) == 2


def test_home_folders(pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run(pipeline, "--seeds", "0", "--out=~/s", "--trajectory=~/t.gif")
    assert (tmp_path / "home" / "s" / "000000.png").is_file()
    assert (tmp_path / "home" / "t.gif").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_the_current_folder(pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(pipeline, "--seeds", "0", "--out", ".", "--grid")
    assert (tmp_path / "here-grid.png").is_file()


def test_subdirs_and_grid(pipeline: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    output = run(pipeline, "--seeds", "7,1007", "--subdirs", "--grid", "--out", folder)
    assert sorted(pngs(folder)) == ["000000/000007.png", "001000/001007.png"]
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    assert [name for name, _ in labels] == ["000000/000007.png", "001000/001007.png"]
    # Beside the folder, so that the folder holds nothing but samples.
    assert Image.open(tmp_path / "s-grid.png").width == 2 * 64 + 2
    assert "s-grid.png" in output


def test_npz(pipeline: str, tmp_path: Path) -> None:
    run(pipeline, "--seeds", "9,2-4", "--batch", 3, "--out", tmp_path / "x.npz", "--class", "cat")
    with np.load(tmp_path / "x.npz") as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], tiny_pipeline().sample([9, 2, 3, 4], labels=2))
        assert file["arr_1"].tolist() == [2, 2, 2, 2]
        assert file["arr_1"].dtype == np.int64
    run(pipeline, "--seeds", "0", "--format", "npz", "--out", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["samples.npz"]


def test_npz_without_classes(tmp_path: Path) -> None:
    tiny_pipeline(num_classes=0).save(tmp_path / "p")
    run(tmp_path / "p", "--seeds", "0", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0"]


def test_grid(pipeline: str, tmp_path: Path) -> None:
    run(pipeline, "--seeds", "0-8", "--out", tmp_path / "g.png", "--class", "balanced")
    assert Image.open(tmp_path / "g.png").size == (3 * 64 + 4, 3 * 64 + 4)
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_trajectory(pipeline: str, tmp_path: Path, suffix: str) -> None:
    film, folder = tmp_path / f"t.{suffix}", tmp_path / "s"
    output = run(pipeline, "--seeds", "0-19", "--out", folder, "--steps", 6, "--trajectory", film)
    assert str(film) in output
    assert len(pngs(folder)) == 20
    with Image.open(film) as movie:
        assert movie.n_frames == 6
        panel = 4 * 64 + 6
        assert movie.size == (2 * panel + 12, panel + 20)
        movie.seek(5)
        last = np.asarray(movie.convert("RGB")).astype(int)
    # In the last frame the state and the estimate are the finished images.
    corner = np.asarray(Image.open(folder / "000000.png")).astype(int)
    for left in (0, panel + 12):
        shown = last[20 : 20 + 64 : 8, left : left + 64 : 8]
        assert abs(shown - corner).mean() < 30


def test_sampler_and_guidance_options(pipeline: str, tmp_path: Path) -> None:
    output = run(
        pipeline, "--seeds", "0-1", "--out", tmp_path / "a", "sampler=ablation",
        "discretization=vp", "schedule=vp", "scaling=vp", "solver=euler", "--steps", 5,
    )  # fmt: skip
    assert "5 network evaluations" in output
    settings = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert settings["sampler"]["kind"] == "ablation"
    assert settings["sampler"]["sigma_max"] is None
    output = run(pipeline, "--seeds", "0-1", "--out", tmp_path / "b", "--guidance", "1.5")
    assert "10 network evaluations" in output
    output = run(
        pipeline, "--seeds", "0-1", "--out", tmp_path / "c", "--guidance", 1.5,
        "--guide", pipeline, "guidance_interval=0.01,10",
    )  # fmt: skip
    assert "7 network evaluations" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1-x"], "'1-x'"),
        (["--class", "dog"], "no class 'dog'"),
        (["guidance_interval=3"], "guidance_interval"),
        (["guidance_interval=1,3"], "does nothing at --guidance 1"),
        (["--guide", "runs/a"], "does nothing at --guidance 1"),
        (["--trajectory", "x.mp4"], ".gif or .webp"),
        (["--ema", "5"], "What it has: 1000"),
        (["--guidance", "2", "--guide", "nowhere"], "there is no pipeline 'nowhere'"),
        (["--out", "x.npz", "--grid"], "belong to PNGs"),
        (
            ["--class", "none", "--guidance", "1.5"],
            "^--guidance 1.5 does nothing.*by --class",
        ),
        (["sigma_min=90"], "^`sigma_min=90` must be less than `sigma_max=80`"),
        (["--steps", "0"], "^--steps 0: "),
        (["eta=0.5"], "no option `eta`. It is one of `sampler=ddim`"),
        (["skip=0.5"], "Leave out `skip`"),
        (["mask_coords=true"], "Leave out `mask_coords`"),
        (["size=9x8"], "Or choose `layout=windows` or `layout=pad`"),
        (["--guidance", "2", "guidance_interval=5,1"], "^`guidance_interval=5,1`: give"),
    ],
)
def test_errors(pipeline: str, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        run(pipeline, "--out", tmp_path / "s", *options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "options",
    [("sampler=ddim",), ("sampler=ddpm", "noise_schedule=linear", "--steps", "5000")],
)
def test_what_a_sampler_refuses_does_not_stand_in_the_way_of_its_mend(
    pipeline: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for out in (tmp_path / "new" / "s", tmp_path / "s.npz"):
        with pytest.raises(TesseraError):
            run(pipeline, "--seeds", "0-1", "--out", out, *options)
    assert not list(tmp_path.iterdir())
    run(pipeline, "--seeds", "0-1", "--out", tmp_path / "new" / "s", "sampler=ddim",
        "noise_schedule=linear", "--steps", "3")  # fmt: skip
    assert len(pngs(tmp_path / "new" / "s")) == 2


def test_a_sampling_that_fails_before_its_first_image_leaves_nothing(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    arguments = (pipeline, "--seeds", "0-3", "--batch", 2, "--subdirs", "--out", tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "to_pixels", fail)
        with pytest.raises(MemoryError):
            run(*arguments)
    assert not list(tmp_path.iterdir())
    # After the first images the settings stay, so that the same command goes on.
    once = Pipeline.to_pixels
    calls: list[int] = []

    def later(self: Pipeline, x: Any) -> Any:
        calls.append(1)
        return once(self, x) if len(calls) == 1 else fail()

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "to_pixels", later)
        with pytest.raises(MemoryError):
            run(*arguments)
    assert len(list((tmp_path / "s").rglob("*.png"))) == 2
    assert "2 images were there already" in run(*arguments)


def test_results_that_cannot_be_written_are_refused_before_the_work(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(Pipeline, "to_pixels", None)
    film = ("--out", tmp_path / "s", "--trajectory", tmp_path / "file" / "t.gif")
    for options in (*(("--out", tmp_path / "file" / f"s.{kind}") for kind in ("npz", "png")), film):
        with pytest.raises(TesseraError, match="cannot be written: a part of its path is a file"):
            run(pipeline, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_jobs_take_latents(pipeline: str, tmp_path: Path) -> None:
    pipe = load(pipeline)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    job = Job(pipe, [0, 1, 2], 0, 2, {"latents": latents})
    generate_folder(job, tmp_path / "s")
    expected = pipe.sample([0, 1, 2], 0, latents=latents)
    assert np.array_equal(read_images(tmp_path / "s", [0, 1, 2]), expected)
    other = Job(pipe, [0, 1, 2], 0, 2, {"latents": -latents})
    with pytest.raises(TesseraError, match="latents"):
        generate_folder(other, tmp_path / "s")


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_two_processes_make_the_files_of_one(pipeline: str, tmp_path: Path, kind: str) -> None:
    one, two = (tmp_path / name / f"s.{kind}".removesuffix(".png") for name in ("one", "two"))
    run(pipeline, "--seeds", "0-6", "--batch", 2, "--out", one)
    ranks = fork_ranks(
        2, "sample", pipeline, "--seeds", "0-6", "--batch", 2, "--out", two, "--device", "cpu",
        "--precision", "fp32",  # as `auto` is in tests
    )  # fmt: skip
    outputs = ["".join(process.communicate(timeout=120)) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "7 images in" in outputs[0]
    assert "images" not in outputs[1]
    if kind == "png":
        assert pngs(one) == pngs(two)
        assert (one / "dataset.json").read_bytes() == (two / "dataset.json").read_bytes()
    else:
        assert [path.name for path in two.parent.iterdir()] == ["s.npz"]
        with np.load(one) as expected, np.load(two) as found:
            assert np.array_equal(expected["arr_0"], found["arr_0"])
            assert np.array_equal(expected["arr_1"], found["arr_1"])


def test_exit_code_and_message(pipeline: str, tmp_path: Path) -> None:
    process = fork(["sample", pipeline, "--class", "7", "--out", tmp_path])
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("error: there is no class 7. The classes are 0 to 2")
    assert "Traceback" not in errors


def test_a_folder_that_is_not_there_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(TesseraError, match="there is no pipeline 'runs/nope': no such folder"):
        run("runs/nope")


def test_errors_name_options(pipeline: str, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"give `noise_schedule=linear` or .* `sampler=edm`"):
        run(pipeline, "--out", tmp_path / "s.npz", "--seeds", "0", "sampler=ddim")
    result = CliRunner().invoke(app, ["sample", pipeline, "--device", "abacus"])
    assert str(result.exception).startswith("--device abacus: ")


def test_every_seed_has_one_process() -> None:
    seeds = list(range(23))
    for world in (1, 2, 5, 40):
        shares = [share_of_seeds(seeds, 4, rank, world) for rank in range(world)]
        assert sorted(seed for part in shares for seed in part) == seeds
        assert max(map(len, shares)) - min(map(len, shares)) <= 2
