"The whole pipeline, small: the same dvc.yaml in copies of the checkout, twice; then one more attack and defense."
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml

from invertune.lab.profiles import ROOT

ATTACK = '''#| export
@register_attack('toy')
def toy(setup:Setup, size:float=80, **recipe)->tuple:
    "A patch in the middle."
    trigger = patch_trigger(setup.side, setup.seed, size, 'center')
    return train_poisoned(setup, trigger, **recipe), [trigger]'''
DEFENSE = '''#| export
@register_defense('toy')
def toy(case:Case, scale:float=.5)->tuple:
    "Less sure of itself."
    tuned = copy.deepcopy(case.clip)
    with torch.no_grad(): tuned.model.logit_scale.mul_(scale)
    return tuned,{}'''


def environment(root):
    "That of a user who stands in the copy."
    env = {k: v for k, v in os.environ.items() if not k.startswith('INVERTUNE')}
    return {**env, 'PATH': os.path.dirname(sys.executable) + os.pathsep + env['PATH'], 'PYTHONPATH': str(root)}


def copy_checkout(root):
    "What git has or would have, without results, and with one attack."
    words = ['git', 'ls-files', '-co', '--exclude-standard']
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if not (ROOT/name).is_file() or name.startswith('results/'): continue
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, root/name)
    subprocess.run(['git', 'init', '-q'], cwd=root, check=True)
    change_params(root, lambda params: params['main'].update(attacks=['badnet']))
    return root


def change_params(root, change):
    params = yaml.safe_load((root/'params.yaml').read_text())
    change(params)
    (root/'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))


def run_smoke(root):
    "Run the pipeline of a copy; its progress is shown."
    subprocess.run([sys.executable, '-m', 'invertune.run.scheduler', '--profile', 'smoke'], cwd=root, check=True,
                   env=environment(root))
    return root/'results'/'smoke'


@pytest.fixture(scope='module')
def first(tmp_path_factory): return run_smoke(copy_checkout(tmp_path_factory.mktemp('first')))


@pytest.fixture(scope='module')
def again(tmp_path_factory): return run_smoke(copy_checkout(tmp_path_factory.mktemp('again')))


def rows(folder): return list(csv.DictReader((folder/'main'/'table.csv').open()))


def test_the_page_of_the_main_experiment(first):
    "Every defense has a row of plausible percentages, and what the page shows is there."
    defenses = yaml.safe_load((ROOT/'params.yaml').read_text())['main']['defenses']
    assert {r['defense'] for r in rows(first)} >= set(defenses)
    assert all(0 <= float(r[key]) <= 100 for r in rows(first) for key in ('ca', 'asr') if r[key])
    for name in 'table.md', 'table.tex', 'figure.png', 'figure.pdf', 'README.md', 'report.ipynb':
        assert (first/'main'/name).stat().st_size > 0


def measured(folder):
    "Everything a run measured, without what it cost: metrics as numbers, models and triggers as hashes."
    files = [p for p in folder.rglob('*.json') if p.name not in ('cost.json', 'costs.json')]
    found = {str(p.relative_to(folder)): json.loads(p.read_text()) for p in files}
    hashes = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*.safetensors')}
    return found | {str(p.relative_to(folder)): h for p, h in hashes.items()} | {'table': rows(folder)}


def test_the_same_again(first, again):
    "Another copy, the same command: the same bits in every tensor and the same digits in every metric."
    one, two = measured(first), measured(again)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def add_cell(root, notebook, source):
    "What a user does who adds a function to a notebook."
    nb = nbformat.read(root/notebook, 4)
    nb.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(nb, root/notebook)


def test_one_more_attack_and_defense(again):
    "One function and one entry each, and nothing else: they have their rows, and what was there comes out as before."
    root = again.parent.parent
    add_cell(root, 'nbs/method/08_attacks.ipynb', ATTACK)
    add_cell(root, 'nbs/method/14_defenses.ipynb', DEFENSE)

    def enter(params):
        params['attacks']['toy'] = {'size': 96, 'poisons': 240, 'epochs': 8, 'lr': 1.0e-3, 'bs': 16}
        params['defenses']['toy'] = {'scale': 0.5}
        names = ['none', 'invertune-paper', 'invertune', 'toy']  # fewer than before: there is an attack more
        params['main'].update(attacks=['badnet', 'toy'], defenses=names)
        params['profiles']['smoke']['main'] = {'attacks': ['badnet', 'toy']}
        params['evaluate']['defenses'] = names

    change_params(root, enter)
    export = os.path.join(os.path.dirname(sys.executable), 'nbdev_export')
    subprocess.run([export], cwd=root, check=True, env=environment(root))
    before = measured(again)
    run_smoke(root)
    found = {(r['attack'], r['defense']) for r in rows(again)}
    assert {('toy', 'toy'), ('toy', 'invertune'), ('badnet', 'toy'), ('badnet', 'none')} <= found
    after = measured(again)
    kept = [name for name in before if name.startswith(('data/', 'train/', 'poison/', 'defend/'))]
    assert len(kept) > 20 and [name for name in kept if after[name] != before[name]] == []
