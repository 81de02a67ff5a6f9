"""Sphinx: `make docs` builds the site into `build/site`, offline, and fails at a warning."""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _reference  # noqa: E402
import docutils.nodes  # noqa: E402
import latex2mathml.converter  # noqa: E402

import logitjax  # noqa: E402

_reference.write(HERE / "reference")

project = "logitjax"
author = "The logitjax authors"
copyright = author
version = release = logitjax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_*", "README.md"]
# Pages link to one another's headings as they do on the repository's page.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist", "dollarmath"]
html_math_renderer = "mathml"

autodoc_typehints = "none"  # shapes stand in the docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "literal"
nitpicky = True
nitpick_ignore_regex = [
    # Python's own and other libraries' names: there is no inventory of them offline.
    ("py:(class|exc|obj)", r"(?!logitjax).*"),
    # What functions return and nobody makes has no entry of its own.
    ("py:class", r"logitjax\.(\w+\.)+_\w+\.\w+"),
]

html_theme = "sphinx_book_theme"
html_title = "logitjax"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "home_page_in_toc": True}
# Without the theme's second search box.
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
html_js_files = ["tables.js"]
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

_BACKTICKS = re.compile(r"(?<![`:\w])`([^`\n]+)`(?!`|__?\b)")
_HOMES = {
    name: f"logitjax.{package}.{name}"
    for package in reversed(_reference.PACKAGES)
    for name in _reference.public(_reference.imported(package))
}


def link_names(app, what, name, obj, options, lines):
    """`name` in a docstring leads to that public name's entry, and is code where it is none."""
    del app, what, name, obj, options

    def linked(match):
        target = _HOMES.get(match[1]) or _HOMES.get(match[1].rpartition(".")[2])
        if target is None or target == match[1]:
            return f"``{match[1]}``"
        return f":py:obj:`{match[1]} <{target}>`"

    lines[:] = [line if line.startswith("|") else _BACKTICKS.sub(linked, line) for line in lines]
    # Tables are written as on the repository's pages; here they are shown as they stand. Those that
    # a doctest prints follow its line at once.
    for i in reversed(range(1, len(lines))):
        if lines[i].startswith("|") and not lines[i - 1].strip():
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith("|")), None)
            lines[i:end] = ["::", "", *(f"   {line}" for line in lines[i:end])]


def offer_files(app, docname, source):
    """A page of the repository that is none of the site is offered as a file."""
    del app
    outside = re.escape("../" * (docname.count("/") + 1))
    link = re.compile(rf"\[([^\]]+)\]\(({outside}[^)#]+\.md)\)")
    source[0] = link.sub(r"{download}`\1 <\2>`", source[0])


def visit_math(self, node):
    """Formulas as MathML, which browsers draw without scripts or fonts from elsewhere."""
    block = isinstance(node, docutils.nodes.math_block)
    text = latex2mathml.converter.convert(
        node.astext(), display="block" if block else "inline", xmlns=""
    )
    self.body.append(text)
    raise docutils.nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    # Before napoleon, which makes field lists of the sections.
    app.connect("autodoc-process-docstring", link_names, priority=400)
    app.connect("source-read", offer_files)
