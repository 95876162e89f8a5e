"""`tessera studio`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tessera.studio.serve import Address


def studio(
    folder: Path = typer.Argument(Path("runs"), help="Folder of runs and pipelines."),
    port: int = typer.Option(7860, min=0, max=65535, help="Port to listen on; 0: any free one."),
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on; beyond this machine a token is asked for."
    ),
    token: str | None = typer.Option(
        None, help="That browsers must give. (default: random where one is asked for)"
    ),
    no_browser: bool = typer.Option(False, "--no-browser", help="Open no browser."),
    device: str | None = typer.Option(
        None, help="Of samples: cpu, cuda, ... (default: the fastest)"
    ),
) -> None:
    """Open a page in the browser over a folder of runs: watch, steer, compare, sample, start.

    It listens on this machine only, unless --host says otherwise. Trainings that it starts go on
    when it ends.
    """
    from tessera.studio.folder import StudioFolder
    from tessera.studio.serve import open_browser, serve

    def ready(address: Address) -> None:
        print(f"the studio of {folder} is at {address.url}", flush=True)
        print("Ctrl-C ends it; trainings go on", flush=True)
        if not no_browser:
            open_browser(address)

    serve(StudioFolder(folder), host=host, port=port, token=token, device=device, ready=ready)
