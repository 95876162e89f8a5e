"""Processes that start at once: forks of one that has imported PyTorch and tessera already.

Importing them takes seconds of each process that a test starts. Here one server of the test session
imports them, starts no thread, and forks a process for each request, with the arguments, variables,
folder and files of a command that was started anew. What such a process prints, how it ends and
what signals do to it is its own.

As a program, `python -SE forked.py run SOCKET ARGUMENTS` is `tessera ARGUMENTS`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    "tessera.cli",
    "tessera.training.trainer",
    "tessera.training.probe",
    "tessera.pipelines.stream",
    "tessera.metrics.evaluate",
    "tessera.metrics.classifier",
)


# --------------------------------------------------------------------------------- in the tests


class Forked:
    """A process of the server, with what tests use of `subprocess.Popen`, in text."""

    def __init__(self, connection: socket.socket, files: Mapping[str, int]) -> None:
        self._answers = connection.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None
        self.stdin = os.fdopen(files["stdin"], "w") if "stdin" in files else None
        self.stdout = os.fdopen(files["stdout"]) if "stdout" in files else None
        self.stderr = os.fdopen(files["stderr"]) if "stderr" in files else None
        self._connection = connection

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._answers.readline())
            except TimeoutError:
                raise subprocess.TimeoutExpired("tessera", timeout or 0) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None:
            self._connection.setblocking(False)
            try:
                self._connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return None
            self.wait()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """End its input, and wait for its end; what it has printed and not been read yet."""
        texts = {"stdout": "", "stderr": ""}

        def read(name: str, file: Any) -> None:
            texts[name] = file.read()
            file.close()

        files = {name: getattr(self, name) for name in texts}
        readers = [
            threading.Thread(target=read, args=(name, file), daemon=True)
            for name, file in files.items()
            if file is not None and not file.closed
        ]
        if self.stdin is not None:
            self.stdin.close()
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts["stdout"], texts["stderr"]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(
    arguments: Sequence[object],
    *,
    code: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bool = False,
) -> Forked:
    """Start `tessera ARGUMENTS`, or the Python `code` as `python -c` would, with these arguments.

    Args:
        env: all of its environment variables; those of this process unless given.
        stdin: whether something will be written to it; it reads nothing otherwise.
    """
    ours, theirs = {}, [os.open(os.devnull, os.O_RDONLY)]
    for name in ("stdout", "stderr"):
        ours[name], end = os.pipe()
        theirs.append(end)
    if stdin:
        os.close(theirs[0])
        theirs[0], ours["stdin"] = os.pipe()
    request = {
        "arguments": [*map(str, arguments)],
        "code": code,
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd or Path.cwd()),
    }
    connection = _ask(server(), request, theirs)
    for end in theirs:
        os.close(end)
    return Forked(connection, ours)


def fork_ranks(count: int, *arguments: object, **options: Any) -> list[Forked]:
    """`tessera ARGUMENTS` in `count` processes that know of each other, as torchrun starts them,
    but without a launcher that would end them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        fork(arguments, env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, **options)
        for i in range(count)
    ]


@cache
def server() -> str:
    """The socket of this session's server, which ends with the session."""
    folder = tempfile.TemporaryDirectory(prefix="forked-")
    path = f"{folder.name}/socket"
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, __file__, "serve", path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    atexit.register(folder.cleanup)
    atexit.register(process.communicate)  # which ends its input
    assert process.stdout.readline() == b"ready\n", "the server of forks did not start"
    return path


def _ask(path: str, request: Mapping[str, Any], files: Sequence[int]) -> socket.socket:
    """A connection on which the number of the process comes, and, when it ends, its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], files)
    connection.sendall(content)
    return connection


# -------------------------------------------------------------------------------- in the server


def serve(path: str) -> NoReturn:
    """Answer requests until the input ends."""
    import importlib
    import select

    installed = [p for p in sys.path[1:] if p not in os.environ["PYTHONPATH"].split(os.pathsep)]
    sys.path[0] = os.getcwd()
    for name in PRELOADED:
        importlib.import_module(name)
    sys.path[:] = installed
    assert len(os.listdir("/proc/self/task")) == 1, "only what has one thread can be forked"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _watch(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(connection: socket.socket) -> NoReturn:
    """Fork the process that was asked for, and tell how it ends."""
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as reader:
        request = json.loads(reader.read(int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(request, files)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{pid}\n".encode())
    for file in files:
        os.close(file)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(request: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    """Be the process that was asked for, from its first line to its exit code."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.getcwd(), *filter(None, paths)]
    sys.argv = ["tessera", *request["arguments"]]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    code = 0
    try:
        if request["code"] is None:
            from tessera.cli import main

            main()
        else:
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


# ---------------------------------------------------------------------------------- as a program


def run(path: str, *arguments: str) -> NoReturn:
    """Be `tessera ARGUMENTS` for whoever started this: its files, its signals and its end."""
    request = {"arguments": arguments, "code": None, "env": dict(os.environ), "cwd": os.getcwd()}
    answers = _ask(path, request, [0, 1, 2]).makefile("r")
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    sys.exit(int(answers.readline()))


if __name__ == "__main__":
    {"serve": serve, "run": run}[sys.argv[1]](*sys.argv[2:])
