"""`python -m benchmarks [NAME ...] [--record]`: run benchmarks, print tables, keep the figures."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.harness import device
from tessera import memory

NAMES = (
    "unet",
    "loading",
    "latents",
    "metrics",
    "patch",
    "lego",
    "pdm",
    "relay",
    "energy",
    "mar",
    "latents_online",
    "plans",
)


def main() -> None:
    """Run the named benchmarks, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--record", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per variant")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {NAMES}")
    # First what is compared with other programs, whose C library gives freed memory back.
    for name in sorted(arguments.names or NAMES, key=lambda name: name != "metrics"):
        if name != "metrics" and device().type == "cpu":
            memory.keep_freed()  # as the commands do
        module = importlib.import_module(f"benchmarks.{name}")
        module.run(rounds=arguments.rounds, record_figures=arguments.record)


if __name__ == "__main__":
    main()
