"What is generated belongs to what it is generated from: modules and pages to their notebooks, and notebooks are clean."
import json
import re
import shutil
import subprocess
import sys

import pytest

from invertune.lab.profiles import ROOT
from invertune.run.pages import _PAGES, _page_text


@pytest.fixture(scope='module')
def generated(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned as `make prepare` does it."
    copy = tmp_path_factory.mktemp('copy')
    for name in 'settings.ini', 'pyproject.toml': shutil.copy(ROOT/name, copy)
    shutil.copytree(ROOT/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '.last_checked'))
    for init in (ROOT/'invertune').rglob('__init__.py'):
        (copy/init.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, copy/init.relative_to(ROOT))
    code = 'from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_export(); nbdev_clean()'
    subprocess.run([sys.executable, '-c', code], cwd=copy, check=True)
    return copy


def modules(root): return {p.relative_to(root).as_posix(): p.read_text() for p in (root/'invertune').rglob('*.py')}


def test_modules_equal_notebooks(generated):
    made, kept = modules(generated), modules(ROOT)
    assert set(kept) == set(made), 'a module without a notebook, or a notebook that was never exported'
    assert [n for n in kept if kept[n] != made[n]] == [], 'run `make prepare`'


def test_notebooks_are_clean(generated):
    "No run counts, no metadata but tags: a diff shows what changed."
    books = sorted((ROOT/'nbs').rglob('[!.]*.ipynb'))
    load = lambda path: json.loads(path.read_text())
    dirty = [b.name for b in books if '.ipynb_checkpoints' not in b.parts
             and load(b) != load(generated/b.relative_to(ROOT))]
    assert dirty == [], 'run `make prepare`'


def test_stage_notebooks_show_nothing():
    "What a stage shows differs from run to run; it lies with the results."
    books = sorted((ROOT/'nbs'/'stages').glob('[0-9]*.ipynb'))
    shown = [b.name for b in books if any(c.get('outputs') for c in json.loads(b.read_text())['cells'])]
    assert books and shown == [], 'run `make prepare`'


def test_library_notebooks_show_what_they_make():
    "A notebook without outputs tells half of the story."
    books = [p for folder in ('.', 'method') for p in sorted((ROOT/'nbs'/folder).glob('[0-9]*.ipynb'))]
    bare = [b.name for b in books if not any(c.get('outputs') for c in json.loads(b.read_text())['cells'])]
    assert bare == [], 'run `make outputs`'


@pytest.mark.parametrize('page', _PAGES)
def test_pages_equal_their_notebooks(page):
    "To the digit while the results are the committed ones; after a rerun on another machine, digits may differ."
    rerun = subprocess.run(['git', 'status', '--porcelain', 'results'], cwd=ROOT, capture_output=True, text=True).stdout
    text = lambda s: re.sub(r'-?\d+(\.\d+)?', '#', s) if rerun else s
    assert text((ROOT/page).read_text(encoding='utf-8')) == text(_page_text(page)), 'run `make readme`'
