"""Sphinx configuration. `make docs` builds the site and fails on a broken reference."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from retro_mcore import __version__

project = "retro-mcore"
author = "The retro-mcore authors"
copyright = "2026, The retro-mcore authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "alabaster"
html_theme_options = {"description": "Retro for Megatron-Core", "page_width": "72rem"}
html_show_sphinx = False
templates_path: list[str] = []
exclude_patterns = ["_build"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nitpicky = True
# Types of other projects and of the standard library: their references live elsewhere.
nitpick_ignore_regex = [(r"py:.*", r"(?!retro_mcore).*")]
