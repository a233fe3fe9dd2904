"""The documentation: these pages, and a reference that is made from the package's docstrings.

make docs   # → docs/_build/docs/index.html
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "VLAB-JAX"
author = "the authors of VLAB-JAX"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
# Sphinx reads the tree from its root, so that the README and the experiments' READMEs are pages, too.
root_doc = "docs/index"
include_patterns = ["README.md", "docs/**", "experiments/*.md", "experiments/*/README.md"]
exclude_patterns = ["docs/_build", "docs/_templates", ".*"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = project

# Headings have anchors, so that pages can link to sections.
myst_heading_anchors = 3
# Docstrings name code in single backticks.
default_role = "literal"
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A class may be documented twice, in its module and in the package (`vlab_jax.Clip`).
suppress_warnings = ["ref.python"]


def commands_as_code(app, what, name, obj, options, lines):
    """Turns indented commands in a module's docstring, which reStructuredText takes for quotes, into code blocks."""
    if what != "module":
        return
    made, inside = [], False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside:
            made += ["::", ""]
        inside = indented or (inside and not line)
        made.append(line)
    lines[:] = made


def setup(app):
    """Registers the handler; Sphinx calls this."""
    app.connect("autodoc-process-docstring", commands_as_code)
