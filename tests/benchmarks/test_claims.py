"""The claims: what each compares, and what it records."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.claims import common
from tessera.comparing import compare
from tessera.comparing.arms import Arm, CompareSettings, Point
from tessera.comparing.compare import ArmResult, Comparison

pytest.importorskip("matplotlib")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[Arm], Any]]:
    """What is compared: arms that could be trained, in whose place there are made-up results."""
    found: list[tuple[list[Arm], Any]] = []

    def compared(
        arms: Sequence[Arm], out: object, settings: CompareSettings, parallel: bool
    ) -> Comparison:
        compare._check(arms, settings)
        found.append((list(arms), settings))
        results = [
            result(arm, way.name, number) for arm in arms for number, way in enumerate(arm.ways)
        ]
        return Comparison(tuple(results), settings, 0.5, "", "here")

    monkeypatch.setattr(common, "compare_arms", compared)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "RESULTS.md")
    return found


def result(arm: Arm, way: str, number: int) -> ArmResult:
    """The later the way, the nearer and the costlier."""
    points = (Point(1, 8, 3.0, 0.5), Point(2, 16, 2.0, 0.6))
    name = ", ".join([arm.name, *([way] if way else [])])
    picture = np.zeros((2, 4, 4, 3), np.uint8)
    return ArmResult(
        name, arm.name, arm.source, arm.changes, 0, 10, 2, 1e12, 16, 9 + number, 1, 1,
        20 - number, 0.5, points, (), picture,
    )  # fmt: skip


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """A claim; what it records."""
    monkeypatch.setattr("sys.argv", [name, "--data", "x.zip", "--out", str(folder), *words])
    import_module(f"benchmarks.claims.{name}").main()
    return (folder / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("energy_vs_plain", ["dit, 18 steps", "energy, 9 steps + 1 of descent each"], ()),
        ("experts_vs_single", ["single", "experts"], ("--threshold", "0.5")),
        ("patch_vs_full", ["full images", "patches, p = 0.5"], ()),
        ("linear_start", ["whole images", "means above 1.5", "linear start", "both"], ()),
        ("relay_vs_single", ["single, guidance 3", "relay, guidance 3"], ("--guidance", "3")),
        ("heun_vs_ancestral", ["pdm, DDIM, 10 steps", "pdm, Heun (EDM), 18 steps"], ()),
    ],
)
def test_a_claim_compares_recipes_that_there_are(
    name: str,
    rows: list[str],
    words: tuple[str, ...],
    asked: list[tuple[list[Arm], Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = run(name, tmp_path, monkeypatch, "--minutes", "7", *words)
    ((arms, settings),) = asked
    assert settings.minutes == 7
    assert all(arm.changes[-1] == "data.path=x.zip" for arm in arms)
    for row in rows:
        assert f"\n| {row} | " in text
    assert ("On the way:" in text) == (name in ("patch_vs_full", "linear_start"))
    pictures = [path.name for path in tmp_path.glob("*.png")]
    assert all(f"]({picture})" in text for picture in pictures)
    assert len(pictures) >= 2


def test_what_heun_reaches(
    asked: list[tuple[list[Arm], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--ddpm", "25,50", "--ddim", "", "--edm", "5,9"]
    text = run("heun_vs_ancestral", tmp_path, monkeypatch, *words)
    assert [way.options["steps"] for way in asked[0][0][0].ways] == [25, 50, 5, 9]
    assert (
        "best ancestral score is 19.000, in 10 evaluations. Heun's method has 18.000 in 11" in text
    )


def test_experts_share_the_time(
    asked: list[tuple[list[Arm], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("experts_vs_single", tmp_path, monkeypatch)
    run("experts_vs_single", tmp_path, monkeypatch, "--scratch")
    run("experts_vs_single", tmp_path, monkeypatch, "--branch", "0.5", "--recipe", "cifar10-small")
    pairs = [arms[1] for arms, _ in asked]
    assert [[stage.begins_as for stage in pair.stages] for pair in pairs] == [
        [None, 0], [None, None], [None, 0, 0],
    ]  # fmt: skip
    assert [[stage.joined for stage in pair.stages] for pair in pairs] == [
        [True, True], [True, True], [False, True, True],
    ]  # fmt: skip
    assert {stage.source for stage in pairs[2].stages} == {"cifar10-small"}
    assert [round(stage.share, 3) for stage in pairs[2].stages] == [0.5, 0.447, 0.053]
    assert all(sum(stage.share for stage in pair.stages) == 1 for pair in pairs)
