"A small checkout to break: settings, parameters and a stage notebook of its own, beside the installed package."
import os
import subprocess
import sys

import nbformat
import pytest

PARAMS = '''
profile: glyphs  # the one that is run where none is named
seed: 3
poison: {epochs: 2, lr: 1.0e-3}
attacks: {badnet: {}, sig: {size: 9}}
unseen: {attacks: {}}
data: {source: glyphs}
profiles:
  glyphs: {}
  smoke: {poison: {epochs: 1}}
'''
DECLARED = "profile = 'smoke'\nseed = 0\nattack = 'badnet'\nrecipe = {}\nepochs = 1\nlr = 1.0e-3\nfail = ''\n"
CHECK = '''from invertune.lab.profiles import result_dir
from invertune.runtime import InvertuneError, progress, save_json
from invertune.run.stages import check_parameters
check_parameters(globals(), In, profile=str, seed=int, attack=['badnet', 'sig'], recipe=dict, epochs=int, lr=float,
                 fail=str)'''
WORK = '''if fail == 'sentence': raise InvertuneError('The attack did not take.')
if fail == 'defect': 1/0
if fail == 'killed':
    import os; os.kill(os.getpid(), 9)
for _ in progress(range(epochs), desc='epoch'): pass
out = result_dir(profile, 'poison', seed, attack)
save_json(out/'metrics.json', {'epochs': epochs, 'seed': seed, 'recipe': recipe})'''


class Checkout:
    "A folder that invertune takes for its checkout."
    def __init__(self, root):
        self.root = root
        (root/'settings.ini').write_text('[DEFAULT]\nlib_name = invertune\n')
        (root/'params.yaml').write_text(PARAMS)
        self.stage('30_poison', DECLARED, CHECK, WORK)

    def stage(self, name, parameters, *cells):
        "Write a stage notebook."
        kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (parameters, *cells)],
                                      metadata={'kernelspec': kernel})
        nb.cells[0].metadata['tags'] = ['parameters']
        (self.root/'nbs'/'stages').mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, self.root/'nbs'/'stages'/f'{name}.ipynb')

    def command(self, module, *words, **env):
        "The arguments of a process that runs one of our commands here."
        kept = {k: v for k, v in os.environ.items() if not k.startswith('INVERTUNE')}
        kept['PATH'] = os.path.dirname(sys.executable) + os.pathsep + kept['PATH']
        return dict(args=[sys.executable, '-m', f'invertune.run.{module}', *words], cwd=self.root, text=True,
                    env={**kept, 'INVERTUNE_ROOT': str(self.root), 'PYTHONPATH': os.getcwd(), **env})

    def run(self, module, *words, **env):
        "Run one of our commands here and wait for it."
        return subprocess.run(**self.command(module, *words, **env), capture_output=True)


@pytest.fixture
def checkout(tmp_path): return Checkout(tmp_path)


@pytest.fixture(scope='session')
def small():
    "The poisoned tiny model of the attacks' notebook, and what attacker, defender and evaluation have."
    from invertune.attacks import demo
    return demo()


def limit_of(asked):
    "Deviations that are the limit, where so many classes are asked."
    from invertune.verdict import _stands_out
    return 1 / _stands_out([1.] + [0.]*(asked - 1))


def verdict_of(classes, scores, family='flow'):
    "What `judge` says where these are the scores of all classes, in times what chance explains."
    import torch
    from invertune.identify import Identification
    from invertune.verdict import judge
    scores = [s * limit_of(len(scores)) for s in scores]
    asked = [dict(index=i, family=family, gap=0., score=s, ways={family: s}) for i, s in enumerate(scores)]
    sure = torch.tensor(scores).softmax(0)
    return judge(Identification(list(classes), int(sure.argmax()), family, sure, [], asked))
