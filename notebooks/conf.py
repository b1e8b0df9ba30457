"""Sphinx configuration: ``sphinx-build notebooks site/html`` builds the documentation."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "_ext")]

import jaxmtl  # noqa: E402  from this checkout

project, author, copyright = "jaxmtl", "The jaxmtl authors", "The jaxmtl authors"
release = version = jaxmtl.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # equations without a connection
    "library_pages",
]
html_theme = "furo"
html_title = "jaxmtl"
html_static_path = ["_static"]
html_css_files = ["jaxmtl.css"]
templates_path: list[str] = []
exclude_patterns = ["_ext", "**/.ipynb_checkpoints", "site"]

# Notebooks are executed by tests/test_notebooks.py and committed with their outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

# A name in single backticks is a Python object where there is one, and plain code elsewhere.
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
