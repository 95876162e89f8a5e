"""One arm of a comparison in a process of its own.

python -m tessera.comparing.arm FILE NAME SEED
"""

from __future__ import annotations

import sys
from pathlib import Path

from tessera import distributed
from tessera.comparing.arms import Arm, CompareSettings, train_arm
from tessera.comparing.compare import REFERENCE
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.metrics.reference import load_reference


def _main() -> None:
    """Train the arm; errors are a line on stderr and exit code 2."""
    request, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        content = read_json(request)
        arms = {values["name"]: values for values in content["arms"]}
        arm = Arm.from_dict(arms[name])
        with distributed.session():
            kept = request.parent / REFERENCE
            reference = load_reference(kept, distributed.device()) if kept.is_file() else None
            settings = CompareSettings(**content["settings"])
            train_arm(arm, request.parent, settings, reference, seed)
    except TesseraError as error:
        print(f"error: {name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
