"""Processes and devices: one process needs nothing; torchrun and Slurm start several."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tessera import memory
from tessera.errors import TesseraError

T = TypeVar("T")


def rank() -> int:
    """This process among all; 0 when there is only one."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this process writes the files and talks to the user."""
    return rank() == 0


def active() -> bool:
    """Whether there is a process group; never for one process."""
    return dist.is_available() and dist.is_initialized()


def device(name: str | None = None) -> torch.device:
    """The device of this process: the one of that `name`, or a GPU of its own, Apple's, or the CPU.

    Raises:
        TesseraError: this machine has no such device.
    """
    if name is not None:
        try:
            named = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise TesseraError(
                f"`device={name}`: {str(error).splitlines()[0]}. Name a device that this machine "
                "has, such as cpu"
            ) from error
        if name != "cuda":  # which of several is for the launcher to say
            return named
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextlib.contextmanager
def session(name: str | None = None, timeout_minutes: float = 30) -> Iterator[torch.device]:
    """Join the process group that the launcher's environment describes, and leave it at the end.

    Nothing is joined when there is one process only, or when the caller has joined already.
    Yields the device of this process, as in `device`, which is made the current one. On a CPU, the
    process keeps freed memory from then on (`memory.keep_freed`).

    Args:
        timeout_minutes: the longest that processes wait for each other.

    Raises:
        TesseraError: the launcher's environment is incomplete, there is no device `name`, or
            another process ended or does not answer.
    """
    chosen = device(name)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif chosen.type == "cpu":
        memory.keep_freed()
    joined = _join(chosen, timeout_minutes)
    try:
        yield chosen
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise TesseraError(lost) from error
    finally:
        if joined and active():
            dist.destroy_process_group()


def _join(chosen: torch.device, timeout_minutes: float) -> bool:
    _translate_slurm()
    if active() or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return False
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise TesseraError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set. "
            "Start several processes with: torchrun --nproc_per_node N -m tessera ..."
        )
    # Gloo stands beside NCCL so that small decisions can be agreed on the CPU, without the GPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    with _stdout_to_stderr():
        dist.init_process_group(
            backend,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return True


# What Gloo, NCCL and the store of the process group say when another process is gone or silent.
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
_GONE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|failed to (recv|send)|remote process exited"
    r"|socket (error|closed)|ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)


def lost_process(error: BaseException) -> str | None:
    """What happened to another process that this one waited for, in words; None for other errors.

    Without its full stop.
    """
    text = str(error)
    about = isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text.lower()
    if not (active() and isinstance(error, RuntimeError) and about):
        return None
    if _TIMED_OUT.search(text):
        found = re.search(r"(\d+) ?ms|\(ms\)=(\d+)", text)
        waited = f" for {int(found[1] or found[2]) / 60000:.3g} minutes" if found else " in time"
        return (
            f"process {rank()} of {world()} waited for another one, which did not answer{waited}: "
            "it is stopped, hangs or is cut off from the network. End the processes that are left. "
            "If it was only slow, allow more with run.timeout_minutes"
        )
    if _GONE.search(text):
        return f"process {rank()} of {world()} lost another one, which has ended: see its message"
    return None


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what C++ prints to stderr: Gloo greets on stdout (PyTorch 2.8), where JSON may go."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        if sys.platform != "win32":
            ctypes.CDLL(None).fflush(None)  # of C's own buffer
        os.dup2(kept, 1)
        os.close(kept)


def _translate_slurm() -> None:
    """Give `srun` tasks the names that torchrun uses; torchrun's own have precedence."""
    env = os.environ
    if "RANK" in env or "SLURM_STEP_ID" not in env or int(env.get("SLURM_NTASKS", "1")) <= 1:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", "localhost")))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def _first_host(nodes: str) -> str:
    """The first name of Slurm's compressed list: gpu[07-09,12],login to gpu07."""
    head, bracket, rest = nodes.partition("[")
    return (
        head + re.split(r"[-,\]]", rest)[0] if bracket and "," not in head else head.split(",")[0]
    )


def barrier() -> None:
    """Wait until every process is here."""
    if active():
        dist.barrier()


def broadcast(value: T) -> T:
    """The main process's `value`, on every process (any picklable object; small ones)."""
    if not active():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    result: T = box[0]
    return result


def gather(value: T) -> list[T]:
    """The `value` of every process, in the order of ranks, on every process."""
    if not active():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block on the main process before the others, for files that it prepares.

    An error of the main process ends the wait of the others, with an error of their own.
    """
    if is_main():
        failure: str | None = None
        try:
            yield
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            broadcast(failure)
        return
    failure = broadcast(None)
    if failure is not None:
        raise TesseraError(f"the main process failed: {failure}")
    yield
