"The whole pipeline, small: through the same dvc.yaml, in copies of the checkout, twice."
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from invertune.lab.profiles import ROOT

ATTACK = 'badnet'


def copy_checkout(root):
    "What git has or would have, with the smoke profile switched on and one attack."
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if not (ROOT/name).is_file() or name.startswith('results/'): continue
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, root/name)
    subprocess.run(['git', 'init', '-q'], cwd=root, check=True)
    params = yaml.safe_load((root/'params.yaml').read_text())
    params['profile'], params['report']['attacks'] = 'smoke', [ATTACK]
    (root/'params.yaml').write_text(yaml.safe_dump(params))
    return root


def run_smoke(root):
    "Run the pipeline of a copy; its progress is shown."
    env = {k: v for k, v in os.environ.items() if not k.startswith('INVERTUNE')}
    env['PATH'] = os.path.dirname(sys.executable) + os.pathsep + env['PATH']
    subprocess.run([sys.executable, '-m', 'invertune.run.scheduler'], cwd=copy_checkout(root), check=True, env=env)
    return root/'results'/'smoke'


@pytest.fixture(scope='module')
def first(tmp_path_factory): return run_smoke(tmp_path_factory.mktemp('first'))


def test_table_and_figures(first):
    "Every defense has a row of plausible percentages, and the figures are there."
    rows = list(csv.DictReader((first/'main_table.csv').open()))
    defenses = yaml.safe_load((ROOT/'params.yaml').read_text())['report']['defenses']
    assert [(r['attack'], r['defense']) for r in rows] == [('clean', 'none')] + [(ATTACK, d) for d in defenses]
    assert all(0 <= float(r['ca']) <= 100 and (r['attack'] == 'clean' or 0 <= float(r['asr']) <= 100) for r in rows)
    assert len(list((first/'figures').glob('*.png'))) == len(list((first/'figures').glob('*.pdf'))) > 0


def measured(folder):
    "Everything a run measured, without what it cost: metrics as numbers, models and triggers as hashes."
    found = {str(p.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob('*.json') if p.name not in ('cost.json', 'costs.json')}
    found |= {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*.safetensors')}
    return found | {p.name: p.read_text() for p in folder.glob('main_table.*')}


def test_the_same_again(first, tmp_path):
    "Another copy, the same command: the same bits in every tensor and the same digits in every metric."
    one, two = measured(first), measured(run_smoke(tmp_path))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
