"""Sphinx configuration. The build reads nothing from the network."""

import rsm_sampler

project = "rsm_sampler"
author = "The rsm_sampler developers"
copyright = author
release = version = rsm_sampler.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"{project} {release}"

# Equations: $...$ and $$...$$ in Markdown; headings can be linked to.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

# One page per module, found by itself (see api.md and _templates/autosummary/module.rst).
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
# An "Attributes:" section becomes a list; the types of fields stand in the signature.
napoleon_use_ivar = True
napoleon_attr_annotations = False
