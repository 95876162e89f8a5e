"""How the documentation becomes a site: `make docs`."""

from typing import Any

from tessera import __version__

project = "tessera"
copyright = "the authors of tessera"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tessera {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_google_docstring = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _pages_of_the_project(_app: object, name: str, source: list[str]) -> None:
    """Links to files beside `docs` that are pages of the site, too."""
    up = "../" * name.count("/")
    for file, page in (("benchmarks/RESULTS.md", "results.md"), ("CHANGELOG.md", "changelog.md")):
        source[0] = source[0].replace(f"]({up}../{file}", f"]({up}{page}")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _pages_of_the_project)
