"""Settings of Sphinx: the pages are Markdown (MyST); the command and API references are made from the code at each build.

`make docs` builds into `build/docs` and treats every warning as an error: dead links, missing pages, wrong references.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from afina.version import __version__

project = "afina"
copyright = "the authors of afina, Apache-2.0"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
exclude_patterns = ["build"]

html_theme = "furo"  # system fonts, no requests to other servers
html_title = f"afina {__version__}"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 4
default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
