"""Sphinx: the Markdown of the whole project, as it stands on a code host, and the docstrings.

The source directory is the project's root (``sphinx-build -c docs . build/docs``), so that a
relative link leads to the same file in both. The trees of pages are made here: a toctree is no
Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.addnodes import pending_xref

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import celery_jetstream  # noqa: E402

project = "celery-jetstream"
project_copyright = "celery_jetstream contributors"
version = release = celery_jetstream.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "examples/*/*.md"]
exclude_patterns = [  # not looked into
    ".*",
    "build",
    "dist",
    "tests",
    "benchmarks",
    "celery_jetstream",
    "**/__pycache__",
]

html_theme = "furo"
html_title = f"celery-jetstream {version}"
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["tasklist"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Every name of ours that a docstring or a type refers to must be there. Those of others are not
# looked up: that would need the network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!celery_jetstream\b).*"),
    # types of attributes that are no business of users
    ("py:class", r"celery_jetstream\..*\.(Config|Connection|Handlers|Headers|F|T)"),
    ("py:class", r"celery_jetstream\..*\.(PayloadType|Publisher)"),
]

#: What stands beside the pages: caption and pages of each part. A new page of a folder is in.
TREES = {
    "": ["/README", "/docs/quickstart"],
    "How to": ["/docs/how-to/*"],
    "Production": ["/docs/production/checklist", "/docs/production/*"],
    "Reference": ["/docs/reference/*"],
    "Explanation": ["/docs/explanation/*"],
    "Examples": ["/examples/*/*"],
    "Project": ["/docs/glossary", "/CHANGELOG", "/CONTRIBUTING"],
}


def add_trees(app: Any, docname: str, content: list[str]) -> None:
    if docname == root_doc:
        for caption, pages in TREES.items():
            options = [":hidden:", ":glob:", *([f":caption: {caption}"] if caption else [])]
            content[0] += "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def unlink_folders(app: Any, doctree: Any) -> None:
    """A link to a folder leads somewhere on a code host only; here its text stays."""
    for link in list(doctree.findall(pending_xref)):
        if link["reftype"] == "myst":
            page = Path(app.env.doc2path(app.env.docname))
            if (page.parent / link["reftarget"]).is_dir():
                link.replace_self(link.children)


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", add_trees)
    app.connect("doctree-read", unlink_folders)
    return {"parallel_read_safe": True}
