"Bad parameters and failing notebooks: one sentence, a non-zero exit, and earlier results as they were."
import ast
import json

import nbformat
import papermill
import pytest

from invertune.lab.profiles import NBS, ROOT, load_params
from invertune.runtime import InvertuneError

STAGE_NOTEBOOKS = sorted((NBS/'stages').glob('[0-9]*.ipynb'))


def said(ran):
    "The one sentence of a failed command."
    assert ran.returncode == 1, ran.stdout + ran.stderr
    lines = [l for l in ran.stderr.splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith('invertune: '), ran.stderr
    return lines[0]


@pytest.mark.parametrize('words, sentence', [
    (('poison', 'atack=sig'), "Unknown parameter 'atack': did you mean 'attack'?"),
    (('poison', 'lr=1e-5'), 'such as 1.0e-05'),
    (('poison', 'epochs=false'), 'write a whole number'),
    (('poison', 'epochs="2"'), 'write a whole number'),
    (('poison', 'profile=glyhps'), "did you mean 'glyphs'?"),
    (('poison', 'attack=sigg'), "did you mean 'sig'?"),
    (('poisson',), "did you mean 'poison'?"),
    (('poison', 'badnet'), 'write name=value'),
    (('poison', 'lr=['), 'not YAML'),
    (('poison', 'seed=010'), "'010' would be read as 8"),
    (('poison', 'seed=1:30'), "would be read as 90"),
    (('poison', 'attack=no'), "'no' would be read as False"),
    (('poison', 'seed=1', 'seed=2'), "'seed' is given twice"),
    ((), 'Which stage?'),
])
def test_refused_before_anything_is_run(checkout, words, sentence):
    assert sentence in said(checkout.run('stages', *words))
    assert not (checkout.root/'results').exists() and not (checkout.root/'.cache'/'running').exists()


@pytest.mark.parametrize('text, sentence', [
    ('posion: {lr: 1.0}\n', "did you mean 'poison'?"),
    ('profiles: {glyphs: {trian: {}}}\n', "did you mean 'train'?"),
    ('seed: [1\n', 'is not YAML'),
    ('just words\n', 'holds no sections'),
    ('seed: 010\n', 'would be read as 8'),
    ('seed: 1\nseed: 2\n', 'given twice'),
])
def test_params_yaml_is_refused(tmp_path, text, sentence):
    (tmp_path/'params.yaml').write_text(text)
    with pytest.raises(InvertuneError, match=sentence.replace('?', r'\?')): load_params(tmp_path/'params.yaml')


def test_params_yaml_with_a_number_that_is_text(checkout):
    file = checkout.root/'params.yaml'
    file.write_text(file.read_text().replace('1.0e-3', '1e-3'))
    assert "Parameter 'lr' is '1e-3'" in said(checkout.run('stages', 'poison'))


def test_run_and_failures_leave_earlier_results(checkout):
    "A good run, then three kinds of failure: the good run's files do not change by a byte."
    folder = checkout.root/'results'/'smoke'/'poison'/'3'/'sig'
    ran = checkout.run('stages', 'poison', 'attack=sig', 'profile=smoke')
    assert ran.returncode == 0, ran.stderr
    assert json.loads((folder/'metrics.json').read_text()) == {'epochs': 1, 'seed': 3, 'recipe': {'size': 9}}
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {'metrics.json', 'poison.ipynb'}
    assert str(checkout.root) not in before['poison.ipynb'].decode()
    kinds = {'sentence': 'The attack did not take.', 'defect': 'ZeroDivisionError', 'killed': 'memory'}
    for fail, sentence in kinds.items():
        assert sentence in said(checkout.run('stages', 'poison', 'attack=sig', 'profile=smoke', f'fail={fail}'))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    kept = nbformat.read(checkout.root/'.cache'/'failed'/'smoke-poison-3-sig-poison.ipynb', 4)
    assert any('fail = "defect"' in c.source for c in kept.cells)


def odd(file, how):
    "A notebook as an editor or git may leave it."
    text = file.read_text()
    if how == 'empty': return file.write_text('')
    if how == 'conflict': return file.write_text(text.replace('{', '{\n<<<<<<< HEAD', 1))
    nb = nbformat.reads(text, 4)
    if how == 'untagged': nb.cells[0].metadata.pop('tags')
    if how == 'twice': nb.cells[1].metadata['tags'] = ['parameters']
    nbformat.write(nb, file)


@pytest.mark.parametrize('how, sentence', [
    ('untagged', 'has no cells tagged `parameters`'), ('twice', 'has 2 cells tagged'), ('empty', 'half merged'),
    ('conflict', 'half merged')])
def test_a_notebook_that_lost_its_parameters(checkout, how, sentence):
    "It would run with defaults of its own, and say that all is well."
    odd(checkout.root/'nbs'/'stages'/'30_poison.ipynb', how)
    assert sentence in said(checkout.run('stages', 'poison', 'attack=sig'))
    assert not (checkout.root/'results').exists()


def test_long_temporary_folder_and_no_home(checkout):
    "A cluster's TMPDIR is longer than a socket's name may be; a container may have no home."
    long = checkout.root/'/'.join(['a-folder-of-a-cluster']*6)
    long.mkdir(parents=True)
    ran = checkout.run('stages', 'poison', 'attack=sig', TMPDIR=str(long), HOME='/nonexistent')
    assert ran.returncode == 0, ran.stderr


def test_the_notebook_itself_refuses(checkout, tmp_path, monkeypatch):
    "Papermill alone only warns: run past our runner, with a kernel of its own, the notebook has to stop."
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    book = checkout.root/'nbs'/'stages'/'30_poison.ipynb'
    for given, name in ({'epoch': 9}, "mean 'epochs'"), ({'attack': 'sigg'}, "Unknown attack"), ({'lr': '1e-5'}, '1.0e-05'):
        with pytest.raises(papermill.PapermillExecutionError, match=name):
            papermill.execute_notebook(book, tmp_path/'out.ipynb', given, kernel_name='python3', progress_bar=False)


@pytest.mark.parametrize('notebook', STAGE_NOTEBOOKS, ids=lambda p: p.stem)
def test_stage_notebook_checks_every_parameter(notebook):
    "The first code cell after the parameters names each of them in its call of check_parameters."
    cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == 'code']
    at = next(i for i, c in enumerate(cells) if 'parameters' in c.metadata.get('tags', []))
    declared = [t.id for node in ast.parse(cells[at].source).body if isinstance(node, ast.Assign) for t in node.targets]
    calls = [n for n in ast.walk(ast.parse(cells[at+1].source)) if isinstance(n, ast.Call)]
    calls = [n for n in calls if getattr(n.func, 'id', '') == 'check_parameters']
    assert len(calls) == 1, 'no check_parameters after the parameters cell'
    assert [k.arg for k in calls[0].keywords] == declared
