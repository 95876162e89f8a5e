"""The options of every command are those of a list, so that they grow only on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.main import get_command

from tessera.cli import app

LIST = Path(__file__).with_name("options.json")


def options_of(command: Any, name: str) -> dict[str, list[str]]:
    """Arguments and options of a command, and of those below it."""
    known = [parameter for parameter in command.params if parameter.name != "help"]
    found = {name: sorted(parameter.opts[-1] for parameter in known)}
    for below, part in getattr(command, "commands", {}).items():
        found |= options_of(part, f"{name} {below}")
    return found


def test_options_grow_only_on_purpose() -> None:
    """What one sampler, network or method needs is KEY=VALUE; only what all share is an option."""
    assert options_of(get_command(app), "tessera") == json.loads(LIST.read_text())
