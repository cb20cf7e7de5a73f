"Wings by what must be installed: the tool needs no wing, and the experiments don't need the machinery."
import ast
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest
import yaml

from invertune.lab.profiles import ROOT

PACKAGE = ROOT/'invertune'
WINGS = {wing: sorted(p for p in (PACKAGE/wing).glob('*.py') if p.name != '_modidx.py') for wing in ('', 'lab', 'run')}
HEAVY = ('pandas matplotlib seaborn yaml psutil dvc papermill nbconvert nbformat IPython nbdev fastcore rich '
         'execnb').split()


def imported(file, everywhere=True):
    "Modules that a file imports, in full; those inside of functions, too, or only the ones at its top."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    parts = ['invertune', *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if not isinstance(node, ast.ImportFrom): continue
        base = parts[:len(parts) - node.level + 1] if node.level else []
        module = '.'.join([*base, *filter(None, [node.module])])
        yield from [module, *(f'{module}.{a.name}' for a in node.names)]


def inside(names, *packages):
    "Those of the names that belong to a package."
    return sorted({n for n in names if f'{n}.'.startswith(tuple(f'{p}.' for p in packages))})


@pytest.mark.parametrize('file', WINGS[''], ids=lambda p: p.stem)
def test_the_tool_needs_no_wing(file):
    assert inside(imported(file), 'invertune.lab', 'invertune.run') == []
    assert inside(imported(file, everywhere=False), *HEAVY) == []


@pytest.mark.parametrize('file', WINGS['lab'], ids=lambda p: p.stem)
def test_experiments_do_not_need_the_machinery(file):
    assert inside(imported(file), 'invertune.run', 'dvc', 'papermill', 'nbconvert') == []


@pytest.mark.parametrize('file', WINGS['run'], ids=lambda p: p.stem)
def test_the_machinery_knows_of_experiments_only_their_places(file):
    found = inside(imported(file), 'invertune.lab')
    assert [n for n in found if not n.startswith('invertune.lab.profiles')] in ([], ['invertune.lab'])


STAGES = yaml.safe_load((ROOT/'dvc.yaml').read_text(encoding='utf-8'))['stages']
SHOWN = {'profiles', 'style', 'tables'} # places and looks: no row depends on them


@pytest.mark.parametrize('stage', [name for name in STAGES if (PACKAGE/'lab'/f'{name}.py').exists()])
def test_a_stage_runs_again_when_an_experiment_that_it_borrows_from_changes(stage):
    own = PACKAGE/'lab'/f'{stage}.py'
    borrowed = {name.split('.')[2] for name in inside(imported(own), 'invertune.lab') if name.count('.') > 1} - SHOWN
    assert {f'invertune/lab/{name}.py' for name in {stage, *borrowed}} <= set(STAGES[stage]['deps'])


BLOCKED = '''
import sys
class Finder:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        wing = f'{name}.'.startswith(('invertune.lab.', 'invertune.run.'))
        return None if wing or name.split('.')[0] in BLOCKED else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Finder, sys.meta_path)
'''


def blocked(names, code):
    "What a process prints that finds neither these packages nor the wings."
    code = f'BLOCKED = {names}{BLOCKED}{code}'
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_tool_works_where_nothing_else_is_installed():
    "Import all of it; and plant a backdoor in a tiny model, whose pictures are drawn in a font of matplotlib."
    heavy = [m for m in HEAVY if m != 'yaml']  # open_clip itself reads YAML
    blocked(heavy, 'import ' + ', '.join(f'invertune.{p.stem}' for p in WINGS[''] if p.stem != '__init__'))
    toy = "from invertune.attacks import demo; print(demo(size=48, poisons=16, epochs=1, lr=.008, bs=32).classes[0])"
    assert blocked([m for m in heavy if m != 'matplotlib'], toy) == 'heart'


@pytest.mark.parametrize('wing', WINGS)
def test_a_wing_imports_what_its_extra_installs(wing):
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    texts = [ini['DEFAULT'][key] for key in ('requirements', f'{wing}_requirements') if key in ini['DEFAULT']]
    have = {re.split('[=<>]', r)[0].lower() for r in ' '.join(texts).split()}
    if not wing: assert have.isdisjoint({*map(str.lower, HEAVY), 'pyyaml', 'jupyterlab'})
    names = {'yaml': 'pyyaml', 'PIL': 'pillow', 'sklearn': 'scikit-learn', 'open_clip': 'open_clip_torch',
             'pytorch_msssim': 'pytorch-msssim'}
    tops = {n.split('.')[0] for file in WINGS[wing] for n in imported(file, everywhere=False)}
    needs = tops - set(sys.stdlib_module_names) - {'invertune', '__future__'}
    assert {n for n in needs if names.get(n, n).lower() not in have} == set()
