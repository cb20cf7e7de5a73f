"What is generated belongs to what it is generated from: modules and README to their notebooks, and notebooks are clean."
import json
import re
import shutil
import subprocess
import sys

import pytest

from invertune.run.pages import build_docs, readme_text
from invertune.lab.profiles import ROOT


@pytest.fixture(scope='module')
def generated(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned as `make prepare` does it."
    copy = tmp_path_factory.mktemp('copy')
    for name in 'settings.ini', 'pyproject.toml': shutil.copy(ROOT/name, copy)
    shutil.copytree(ROOT/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '.last_checked'))
    code = 'from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_export(); nbdev_clean()'
    subprocess.run([sys.executable, '-c', code], cwd=copy, check=True)
    return copy


def modules(root): return {p.name: p.read_text() for p in (root/'invertune').glob('*.py')}


def test_modules_equal_notebooks(generated):
    made, kept = modules(generated), modules(ROOT)
    assert set(kept) == set(made), 'a module without a notebook, or a notebook that was never exported'
    assert [n for n in kept if kept[n] != made[n]] == [], 'run `make prepare`'


def test_notebooks_are_clean(generated):
    "No execution counts, no metadata but tags: a diff shows what changed."
    books = sorted((ROOT/'nbs').rglob('[!.]*.ipynb'))
    load = lambda path: json.loads(path.read_text())
    dirty = [b.name for b in books if '.ipynb_checkpoints' not in b.parts and load(b) != load(generated/b.relative_to(ROOT))]
    assert dirty == [], 'run `make prepare`'


def test_readme_equals_front_page():
    "To the digit while the results are the committed ones; after a rerun on another machine, digits may differ."
    rerun = subprocess.run(['git', 'status', '--porcelain', 'results'], cwd=ROOT, capture_output=True, text=True).stdout
    text = lambda page: re.sub(r'-?\d+(\.\d+)?', '#', page) if rerun else page
    assert text((ROOT/'README.md').read_text()) == text(readme_text()), 'run `make readme`'


def test_every_notebook_has_a_page(tmp_path):
    "`make docs` renders all of them, the front page run and without its code, and the list of contents links each."
    index = build_docs(tmp_path/'docs').read_text()
    front = (tmp_path/'docs'/'front.html').read_text()
    pages = {p.name for p in (tmp_path/'docs').glob('*.html')} - {'index.html'}
    books = [*(ROOT/'nbs').glob('[0-9]*.ipynb'), *(ROOT/'nbs'/'pipeline').glob('[0-9]*.ipynb')]
    assert len(pages) >= len(books) and all(f'href="{p}"' in index for p in pages)
    assert '>invertune-paper</td>' in front and 'def told' not in front # its tables, and not the code that reads them
