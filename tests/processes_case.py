"""A function run by several processes that know of each other."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from tessera import distributed


def _process(rank: int, world: int, port: int, function: Callable[..., Any], *args: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        with distributed.session():
            function(*args)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        raise


def in_processes(world: int, function: Callable[..., Any], *args: Any) -> None:
    """Run `function` in `world` processes that know of each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _process, args=(world, port, function, *args), nprocs=world, start_method="fork"
    )
