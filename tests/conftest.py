"A small checkout to break: settings, parameters and stage notebooks of its own, beside the installed package."
import os
import subprocess
import sys

import nbformat
import pytest

PARAMS = '''
profile: glyphs  # the switch
seed: 3
poison: {epochs: 2, lr: 1.0e-3}
profiles:
  glyphs: {}
  smoke: {poison: {epochs: 1}}
'''
DECLARED = "profile = 'smoke'\nseed = 0\nattack = 'badnet'\nepochs = 1\nlr = 1.0e-3\nfail = ''\n"
CHECK = '''from invertune.paths import result_dir
from invertune.runtime import InvertuneError, progress, save_json
from invertune.run.stages import check_parameters
check_parameters(globals(), In, profile=str, seed=int, attack=['badnet', 'sig'], epochs=int, lr=float, fail=str)'''
WORK = '''if fail == 'sentence': raise InvertuneError('The attack did not take.')
if fail == 'defect': 1/0
if fail == 'killed':
    import os; os.kill(os.getpid(), 9)
for _ in progress(range(epochs), desc='epoch'): pass
save_json(result_dir(profile, 'poison', attack)/'metrics.json', {'epochs': epochs, 'seed': seed})'''


class Checkout:
    "A folder that invertune takes for its checkout."
    def __init__(self, root):
        self.root = root
        (root/'settings.ini').write_text('[DEFAULT]\nlib_name = invertune\n')
        (root/'params.yaml').write_text(PARAMS)
        self.stage('30_poison', DECLARED, CHECK, WORK)

    def stage(self, name, parameters, *cells):
        "Write a stage notebook."
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (parameters, *cells)],
                                      metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
        nb.cells[0].metadata['tags'] = ['parameters']
        (self.root/'nbs'/'pipeline').mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, self.root/'nbs'/'pipeline'/f'{name}.ipynb')

    def command(self, module, *words):
        "The arguments of a process that runs one of our commands here."
        env = {k: v for k, v in os.environ.items() if not k.startswith('INVERTUNE')}
        env['PATH'] = os.path.dirname(sys.executable) + os.pathsep + env['PATH']
        return dict(args=[sys.executable, '-m', f'invertune.{module}', *words], cwd=self.root, text=True,
                    env={**env, 'INVERTUNE_ROOT': str(self.root), 'PYTHONPATH': os.getcwd()})

    def run(self, module, *words):
        "Run one of our commands here and wait for it."
        return subprocess.run(**self.command(module, *words), capture_output=True)


@pytest.fixture
def checkout(tmp_path): return Checkout(tmp_path)


@pytest.fixture(scope='session')
def small():
    "The poisoned tiny model of the attacks' notebook, and what attacker, defender and evaluation have."
    from invertune.attacks import demo
    return demo()
