"""What is kept between runs: converted sets by their content, and how fast recipes train here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tessera import distributed, memory, precision
from tessera._version import __version__
from tessera.data.convert import Report, convert_images
from tessera.data.loader import StepKind
from tessera.data.packed import PackedFile
from tessera.errors import DataError, TesseraError
from tessera.files import read_json, user_path, write_json
from tessera.metrics.reference import build_reference, find_reference, save_reference
from tessera.recipes.build import build_view
from tessera.recipes.loading import dump_recipe
from tessera.recipes.schema import Recipe
from tessera.starting.choice import Machine, Measure
from tessera.starting.facts import ImageFacts
from tessera.training.feed import Feed
from tessera.training.forecast import Timings
from tessera.training.others import OtherPrograms
from tessera.training.probe import blank_images, measure

_FORMAT = 1  # of what is kept
_SECONDS = 4.0  # that measuring a recipe takes
_DISTURBED = 0.2  # share of the processors that other programs took; what was measured then is old
_GLANCE = 0.3  # seconds of looking whether they are gone


def cache_folder() -> Path:
    """`$TESSERA_CACHE`, or `tessera` in `$XDG_CACHE_HOME`, or `~/.cache/tessera`."""
    own = os.environ.get("TESSERA_CACHE")
    if own:
        return user_path(own).absolute()
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").absolute() / "tessera"


# -------------------------------------------------------------------------------------- the images


def converted(facts: ImageFacts, recipe: Recipe, say: Callable[[str], None]) -> Path:
    """The images as a packed set of the size that a recipe wants, made once.

    The same images in another folder are the same set. It appears when it is whole.

    Args:
        say: called with a sentence on what was done.

    Raises:
        DataError: an image that looked well cannot be decoded is left out; nothing is left.
    """
    data = recipe.data
    kind = "grey" if data.channels == 1 else "rgb"
    name = f"{facts.digest[:20]}-{data.resolution}-{kind}-v{_FORMAT}.safetensors"
    path = cache_folder() / "data" / name
    if _whole(path):
        say(f"converted before: {path}")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    made: Report = convert_images(
        facts.path,
        path,
        resolution=(data.resolution, data.resolution),
        transform="center-crop",
        channels=data.channels,
        skip_bad=True,
        overwrite=True,
    )
    left_out = [message for message in made.bad if message not in facts.skipped]
    more = f", {len(made.bad):,} left out" if made.bad else ""
    say(f"converted {made.count:,} images in {made.seconds:.0f} s{more}: {path}")
    for message in left_out[:5]:
        say(f"left out: {message}")
    return path


def _whole(path: Path) -> bool:
    try:
        return path.is_file() and len(PackedFile(path).images) > 0
    except DataError:  # damaged by whatever, and made again
        return False


def reference_beside(path: Path, images: int, device: torch.device) -> Path | None:
    """The judge of samples, a classifier of these images, made once and kept beside them.

    Args:
        images: that it is trained on at most.

    Returns:
        None where there are too few images for one.
    """
    found = find_reference(path)
    if found is not None:
        return found
    from tessera.data.dataset import open_dataset

    dataset = open_dataset(path)
    try:
        reference = build_reference(dataset, training_images=images, device=device)
    except DataError:  # too few
        return None
    file = path.with_name(f"{path.stem}.ref.npz")
    save_reference(file, reference)
    return file


# --------------------------------------------------------------------------------------- the speed


def this_machine() -> Machine:
    """The device that would train here."""
    device = distributed.device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        size = int(torch.cuda.get_device_properties(device).total_memory)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
        size = memory.physical()
    kind = precision.resolve("auto", device)
    return Machine(name, device.type, (kind, precision.reason("auto", device)), size)


def _processor() -> str:
    """The model of the processor, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return models[0] if models else platform.machine()


def measured_here(machine: Machine, device: torch.device) -> Measure:
    """Measures recipes on black images, and keeps what was found: a second look finds the same.

    So the same images and time give the same recipe, though measurements scatter. What is kept is
    that of a machine, a version of PyTorch and of this library, and the recipe without its data and
    length; `speeds.json` in the cache folder may be removed. What was measured beside other
    programs is measured anew when most of them are gone.
    """
    others_now = functools.cache(_others_now)

    def timings(recipe: Recipe) -> Timings:
        file = cache_folder() / "speeds.json"
        key = _key(machine, recipe)
        kept = _kept_speeds(file)
        if key in kept:
            try:
                found = _read_timings(kept[key])
                if found.others < _DISTURBED or others_now() > found.others / 2:
                    return found
            except (KeyError, TypeError, ValueError):  # written by hand, or by a later version
                pass
        found = _measured(recipe, device)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, _kept_speeds(file) | {key: _plain_timings(found)})
        return found

    return timings


def _others_now() -> float:
    """Share of the processors that other programs take."""
    others = OtherPrograms()
    time.sleep(_GLANCE)
    return others.share()


def _measured(recipe: Recipe, device: torch.device) -> Timings:
    data = recipe.data.model_copy(update={"held_out": None, "validation": None, "path": None})
    chosen = precision.resolve(recipe.training.precision, device)
    training = recipe.training.model_copy(update={"precision": chosen})
    recipe = recipe.model_copy(update={"data": data, "training": training})
    try:
        feed = Feed(recipe, device, dataset=blank_images(recipe))
        return measure(recipe, feed, device, _SECONDS)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, TesseraError) or not memory.used_up(error):
            raise
        # Too large for this machine: as slow as needed, and larger than all memory.
        steps = {plan.kind: 3600.0 * plan.images for plan, _ in build_view(recipe).shares()}
        return Timings(steps, 0.0, 0.0, 0.0, 2**62)


def _key(machine: Machine, recipe: Recipe) -> str:
    plain = dump_recipe(recipe)
    for name in ("name", "description"):
        del plain[name]
    for name in ("path", "held_out", "validation"):
        plain["data"][name] = None
    plain["run"] = {"preview": plain["run"]["preview"]}
    about = [_FORMAT, __version__, torch.__version__, dataclasses.astuple(machine), plain]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _kept_speeds(file: Path) -> dict[str, Any]:
    try:
        kept = read_json(file)
    except (FileNotFoundError, DataError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _plain_timings(timings: Timings) -> dict[str, Any]:
    steps = [[*kind, seconds] for kind, seconds in timings.steps.items()]
    return {**dataclasses.asdict(timings), "steps": steps}


def _read_timings(values: Any) -> Timings:
    steps: dict[StepKind, float] = {}
    for images, *rest, seconds in values["steps"]:
        patch, band = (None if number is None else int(number) for number in rest)
        steps[int(images), patch, band] = float(seconds)
    if not steps or min(steps.values()) <= 0:
        raise ValueError("no speed")
    return Timings(**{**values, "steps": steps})
