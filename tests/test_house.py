"The house rules that can be measured: how many names, how wide, how long, how documented, one word an experiment."
import ast
import json
import re
import subprocess
from collections import Counter

import pytest

from invertune.lab.profiles import EXPERIMENTS, ROOT, STAGES, load_params

MODULES = sorted(p for p in (ROOT/'invertune').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
TREES = {p.relative_to(ROOT/'invertune').as_posix(): ast.parse(p.read_text(encoding='utf-8')) for p in MODULES}
LIMIT = dict(names=220, columns=120, over=.02, prose=100, parameters=15, readme=(90, 130), megabytes=10, pixels=1300)


def cells(kind, folders=NOTEBOOKS):
    "(notebook, source) of all cells of a kind."
    for path in folders:
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == kind: yield path.relative_to(ROOT).as_posix(), ''.join(cell['source'])


def exported(tree):
    "The names in `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__': return ast.literal_eval(node.value)
    return []


def public(kinds=(ast.FunctionDef, ast.ClassDef)):
    "(module, definition) of every public function and class."
    for module, tree in TREES.items():
        yield from ((module, n) for n in tree.body if isinstance(n, kinds) and n.name in exported(tree))


def parameters(function):
    "Its arguments, without self."
    a = function.args
    found = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return [p for p in found if p.arg not in ('self', 'cls')]


def test_few_public_names_and_none_twice():
    names = Counter(n for tree in TREES.values() for n in exported(tree))
    twice = [n for n, k in names.items() if k > 1]
    assert not twice, f'two modules export {twice}'
    many = Counter({m: len(exported(tree)) for m, tree in TREES.items()})
    assert many.total() <= LIMIT['names'], f'{many.total()} public names: {many.most_common(8)}'


def test_code_fits_its_columns():
    lines = [(nb, line) for nb, source in cells('code') for line in source.splitlines() if line.strip()]
    lines += [(p.name, line) for p in sorted((ROOT/'tests').glob('*.py')) for line in p.read_text().splitlines() if line.strip()]
    wide = Counter(nb for nb, line in lines if len(line) > LIMIT['columns'])
    assert wide.total() <= LIMIT['over']*len(lines), f'{wide.total()} of {len(lines)} lines of code are too wide: {wide.most_common(8)}'


def test_prose_fits_its_columns():
    "Tables, code and lines that hold a link are as long as they must be."
    def wide(source):
        source = re.sub(r'^```.*?^```', '', source, flags=re.M | re.S)
        return [line for line in source.splitlines() if len(line) > LIMIT['prose'] and not line.startswith('|')
                and '](' not in line and '$$' not in line]
    found = Counter(nb for nb, source in cells('markdown') for _ in wide(source))
    assert not found, f'lines of prose that are too wide: {found.most_common(8)}'


def test_no_function_has_too_many_parameters():
    many = [(module, node.name) for module, node in public(ast.FunctionDef) if len(parameters(node)) > LIMIT['parameters']]
    assert many == []


def test_every_public_thing_has_one_line_of_documentation():
    def good(node):
        text = ast.get_docstring(node)
        return bool(text) and '\n' not in text
    assert [(m, n.name) for m, n in public() if not good(n)] == []


def test_every_parameter_is_explained():
    "A comment on the line of each parameter: its meaning, shape, unit."
    missing = []
    for module, node in public(ast.FunctionDef):
        lines = (ROOT/'invertune'/module).read_text(encoding='utf-8').splitlines()
        bare = [p.arg for p in parameters(node) if '#' not in lines[p.end_lineno - 1] and '#' not in lines[p.lineno - 1]]
        if bare: missing.append((module, node.name, bare))
    assert missing == []


def test_the_readme_is_neither_short_nor_long():
    least, most = LIMIT['readme']
    assert least <= len((ROOT/'README.md').read_text(encoding='utf-8').splitlines()) <= most


def test_no_path_of_a_machine():
    "Nothing that is committed names a home, a temporary folder or a place of the one who wrote it."
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True).stdout.split('\0')
    if not any(files): pytest.skip('not a git checkout')
    places = re.compile(r'(?<![\w.])/(?:home|root|Users|work|tmp|mnt|scratch)/\w')
    texts = [f for f in files if f and f.endswith(('.py', '.ipynb', '.md', '.json', '.yaml', '.ini', '.txt', '.cff', '.csv', '.lock'))]
    found = [f for f in texts if (ROOT/f).exists() and f != 'tests/test_house.py'
             and places.search((ROOT/f).read_text(encoding='utf-8'))]
    assert found == []


def test_what_notebooks_show_is_small():
    assert sum(p.stat().st_size for p in NOTEBOOKS)/2**20 <= LIMIT['megabytes']


def test_pictures_of_notebooks_fit_a_page():
    "At 96 dots an inch a page of text is 7 to 13 inches wide."
    from base64 import b64decode
    from io import BytesIO
    from PIL import Image
    wide = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            for out in cell.get('outputs', []):
                png = ''.join(out.get('data', {}).get('image/png', ''))
                if png and Image.open(BytesIO(b64decode(png))).width > LIMIT['pixels']: wide.append(path.name)
    assert wide == []


@pytest.mark.parametrize('word', EXPERIMENTS)
def test_one_word_an_experiment(word):
    "Notebook, module, section of params.yaml, stage and make target are called the same."
    from invertune.run.pages import CLAIMS
    assert list((ROOT/'nbs'/'lab').glob(f'[0-9][0-9]_{word}.ipynb')), 'no notebook'
    assert (ROOT/'invertune'/'lab'/f'{word}.py').exists(), 'no module'
    assert word in load_params(), 'no section of params.yaml'
    assert word in CLAIMS, 'no claim'
    makefile = (ROOT/'Makefile').read_text(encoding='utf-8')
    target = 'repro' if word == 'main' else word
    heads = [line.split(':')[0].split() for line in makefile.splitlines() if re.match(r'[\w .$()-]+:(?!=)', line)]
    assert any(target in head or '$(EXPERIMENTS)' in head for head in heads if head[:1] != ['.PHONY']), f'no make {target}'
    assert word in ('main', 'seeds') or word in STAGES, 'no stage'


def test_each_stage_has_a_notebook():
    found = {p.stem[3:] for p in (ROOT/'nbs'/'stages').glob('[0-9][0-9]_*.ipynb')}
    assert found == set(STAGES)
