"""The page with all its tabs."""

from __future__ import annotations

from importlib import resources
from typing import Any

from tessera.studio.beginning import BeginPage
from tessera.studio.comparing import ComparePage
from tessera.studio.desk import Desk, gradio, kept
from tessera.studio.html import head
from tessera.studio.sampling import SamplePage
from tessera.studio.watching import WatchPage

_FILES_KEPT = 3600  # seconds; of images that were sent to the browser


def build(desk: Desk) -> Any:
    """The page over a desk, as Gradio's blocks.

    Raises:
        TesseraError: Gradio is not installed.
    """
    gr = gradio()
    with gr.Blocks(
        title="tessera studio", analytics_enabled=False, delete_cache=(600, _FILES_KEPT),
        fill_width=False,
    ) as blocks:  # fmt: skip
        gr.HTML(head(desk.folder.root), padding=False, elem_id="studio-head")
        with gr.Tabs(elem_id="studio-tabs") as tabs:
            with gr.Tab("Watch", id="watch"):
                watch = WatchPage(desk)
            with gr.Tab("Sample", id="sample") as sample_tab:
                sample = SamplePage(desk)
            with gr.Tab("Compare", id="compare") as compare_tab:
                compare = ComparePage(desk)
            with gr.Tab("Train", id="train"):
                BeginPage(desk, tabs, watch.which)

        def models(value: str | None) -> Any:
            names = desk.bench.names()
            return gr.Dropdown(choices=names, value=kept(value, names))

        def runs(values: list[str] | None) -> Any:
            names = [entry.name for entry in desk.folder.entries() if entry.is_run]
            return gr.Dropdown(choices=names, value=[v for v in values or [] if v in names])

        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        sample_tab.select(models, [sample.which], [sample.which], **quiet)
        compare_tab.select(runs, [compare.which], [compare.which], **quiet, api_name="runs")
    return blocks


def appearance() -> dict[str, Any]:
    """Theme and style; fonts are the system's, so that nothing is fetched."""
    gr = gradio()
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    css = resources.files("tessera.studio").joinpath("studio.css").read_text("utf-8")
    return {"theme": theme, "css": css}
