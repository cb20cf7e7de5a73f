"""The documentation site: every page is a notebook or a markdown file of this checkout, shown as it is committed.

`make docs` builds it into _docs/ without running anything and without a network.
"""
import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = 'invertune'
copyright = '2026 onwards, invertune developers'
html_title = 'invertune'

extensions = ['myst_nb', 'sphinx_external_toc']
external_toc_path = 'docs/_toc.yml'  # what is on the site, and in which order
external_toc_exclude_missing = True
exclude_patterns = ['.*', '_docs', '_proc', 'build', 'data', 'invertune', 'tests', 'results/smoke',
                    '*.egg-info']

nb_execution_mode = 'off'            # notebooks are committed with what they show
nb_custom_formats = {'.ipynb': ['invertune.run.pages._read_notebook', {}]}  # without the lines that are meant for nbdev
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
suppress_warnings = ['etoc.glob']    # a profile without results has no pages of them

html_theme = 'sphinx_book_theme'
html_theme_options = dict(show_navbar_depth=1, show_toc_level=2, use_download_button=False, navbar_persistent=[])
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False


def formula(node, block):
    "MathML: the browser draws it by itself, without a script, a font or a network."
    tex = re.sub(r'\\[bB]igg?(?![a-zA-Z])', '', node.astext())  # MathML finds the size of brackets by itself
    try: return tex2mathml(tex, as_block=block).replace("<mo>'</mo>", '<mo>′</mo>')
    except MathError as e: logging.getLogger(__name__).warning('formula %s: %s', tex, e, location=node)
    return f'<code>{tex}</code>'


def inline(translator, node):
    "A formula in a line of text."
    translator.body.append(formula(node, False))
    raise SkipNode


def display(translator, node):
    "A formula on a line of its own."
    translator.body.append(f'<div class="math">{formula(node, True)}</div>')
    raise SkipNode


def setup(app):
    "Sphinx asks here for what no option sets."
    app.add_html_math_renderer('mathml', (inline, None), (display, None))


html_math_renderer = 'mathml'
