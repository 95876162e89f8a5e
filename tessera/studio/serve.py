"""The server of the studio."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError, require_extra
from tessera.studio.folder import StudioFolder
from tessera.studio.guard import Guard, is_loopback

PORT = 7860


@dataclass(frozen=True)
class Address:
    """Where a studio is reached.

    Attributes:
        host, port: that it listens on.
        token: that a browser must give; None for none.
    """

    host: str
    port: int
    token: str | None

    @property
    def url(self) -> str:
        """For a browser on this machine, or on another one where all are let in."""
        anywhere = self.host in ("0.0.0.0", "::", "")
        name = socket.gethostname() if anywhere else self.host
        name = f"[{name}]" if ":" in name else name
        query = "" if self.token is None else f"?token={self.token}"
        return f"http://{name}:{self.port}/{query}"


def serve(
    folder: StudioFolder,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    token: str | None = None,
    device: str | None = None,
    ready: Callable[[Address], None] = lambda address: None,
) -> None:
    """Run the studio until Ctrl-C.

    Args:
        folder: of runs and pipelines.
        host: address to listen on; beyond loopback there is always a token.
        port: 0 for a free one.
        token: None for none on loopback, and else for a random one.
        device: that models are sampled on; None for the fastest.
        ready: called when it listens.

    Raises:
        TesseraError: Gradio is not installed, the address cannot be had, or the token is no good.
    """
    with listening(folder, host=host, port=port, token=token, device=device) as (server, address):
        server.ready = lambda: ready(address)
        server.serve_forever()


@contextlib.contextmanager
def listening(
    folder: StudioFolder, *, host: str, port: int, token: str | None, device: str | None
) -> Iterator[tuple[Server, Address]]:
    """A server that has its port, and is to be run; its temporary files go with the block.

    Raises:
        TesseraError: see `serve`.
    """
    checked = checked_token(host, token)
    # Read when the package is imported: nothing is sent, and nothing asked of other machines.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="tessera-studio-"))
        os.environ["GRADIO_TEMP_DIR"] = place
        require_extra("gradio", "studio", "tessera studio")
        bound = stack.enter_context(_bound(host, port))
        address = Address(host, bound.getsockname()[1], checked)
        yield Server(_application(folder, Path(place), address, device), bound), address


class Server:
    """Answers on a socket.

    Attributes:
        ready: called once it does.
    """

    def __init__(self, application: Any, bound: socket.socket) -> None:
        uvicorn: Any = require_extra("uvicorn", "studio", "tessera studio")
        config = uvicorn.Config(
            application, log_level="critical", timeout_graceful_shutdown=1, server_header=False,
            proxy_headers=False,
        )  # fmt: skip
        self._server, self._bound = uvicorn.Server(config), bound
        self.ready: Callable[[], None] = lambda: None

    def serve_forever(self) -> None:
        """Until a signal, or `stop`."""
        threading.Thread(target=self._tell, daemon=True).start()
        self._server.run(sockets=[self._bound])

    def stop(self) -> None:
        """End `serve_forever`, which runs in another thread."""
        self._server.should_exit = True

    def _tell(self) -> None:
        while not self._server.started and not self._server.should_exit:
            time.sleep(0.05)
        if self._server.started:
            self.ready()


def checked_token(host: str, token: str | None) -> str | None:
    """The token that is asked for: none on loopback unless one is given, else a random one.

    Raises:
        TesseraError: it is too short, or not for addresses.
    """
    if token is None:
        return None if is_loopback(host) else secrets.token_urlsafe(24)
    if not re.fullmatch(r"[A-Za-z0-9_-]{8,}", token):
        raise TesseraError("`token`: give at least 8 letters, digits, - or _")
    return token


def open_browser(address: Address) -> None:
    """Show the studio in the user's browser, if there is one."""
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(address.url)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address.

    Raises:
        TesseraError: it cannot be had.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise TesseraError(f"`host={host}`: there is no such address here ({error})") from None
    try:
        if os.name == "posix":  # elsewhere this would let two servers have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(128)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise TesseraError(
                f"port {port} is taken, perhaps by another studio. Choose another one: "
                f"`port={port + 1}`, or `port=0` for any that is free"
            ) from None
        raise TesseraError(f"{host}, port {port}: {error.strerror}") from None
    return made


def _application(folder: StudioFolder, scratch: Path, address: Address, device: str | None) -> Any:
    """The page as an ASGI application, behind its guard."""
    from tessera.studio.app import appearance, build
    from tessera.studio.desk import Desk, gradio

    fastapi: Any = require_extra("fastapi", "studio", "tessera studio")
    blocks = build(Desk.at(folder, scratch, device))
    blocks.queue(default_concurrency_limit=4)
    application = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    mounted = gradio().mount_gradio_app(
        application, blocks, path="/", server_name=address.host, server_port=address.port,
        footer_links=[], ssr_mode=False, show_error=False, max_file_size=1024, pwa=False,
        mcp_server=False, enable_monitoring=False, run_history=False, **appearance(),
    )  # fmt: skip
    return Guard(mounted, address.host, address.token, f"tessera-studio-{address.port}")
