"The scheduler over a real DVC pipeline of three small stages: side by side, stopped anywhere, taken up again."
import json
import signal
import subprocess
import time

import pytest
import yaml

STAGES = {
    'first': {'cmd': 'cat data/in.txt > first.txt', 'deps': ['data'], 'outs': [{'first.txt': {'cache': False}}]},
    'twin': {'matrix': {'attack': ['a', 'b']}, 'cmd': 'sh work.sh ${item.attack}', 'deps': ['first.txt', 'work.sh'],
             'outs': [{'${item.attack}.txt': {'persist': True}}]},
    'report': {'matrix': {'profile': ['${profile}']}, 'cmd': 'cat a.txt b.txt > report.txt', 'deps': ['a.txt', 'b.txt'],
               'outs': [{'report.txt': {'cache': False}}]}}


@pytest.fixture
def repo(checkout):
    "A checkout with a pipeline."
    dvc = lambda *words: subprocess.run([*checkout.command('pipeline')['args'][:2], 'dvc', *words], cwd=checkout.root, check=True,
                                        capture_output=True)
    subprocess.run(['git', 'init', '-q'], cwd=checkout.root, check=True)
    dvc('init', '-q')
    dvc('config', 'core.analytics', 'false')
    (checkout.root/'data').mkdir()
    (checkout.root/'data'/'in.txt').write_text('input\n')
    dvc('add', '-q', 'data')
    (checkout.root/'work.sh').write_text('cp first.txt $1.txt')
    (checkout.root/'dvc.yaml').write_text(yaml.safe_dump({'stages': STAGES}))
    return checkout


def test_run_skip_and_continue(repo):
    ran = repo.run('pipeline')
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (repo.root/'report.txt').read_text() == 'input\ninput\n'
    assert '5 stages, 1 up to date' in ran.stdout
    assert '5 stages, 5 up to date' in repo.run('pipeline').stdout
    (repo.root/'work.sh').write_text('cp first.txt $1.txt; echo $1 >> $1.txt')
    assert '5 stages, 2 up to date' in repo.run('pipeline').stdout
    assert (repo.root/'report.txt').read_text() == 'input\na\ninput\nb\n'


def test_failure_says_why_and_keeps_results(repo):
    assert repo.run('pipeline').returncode == 0
    (repo.root/'work.sh').write_text('echo "invertune: twin: The attack did not take." >&2; exit 1')
    costs, = (repo.root/'.cache'/'costs').iterdir()
    costs.write_text(json.dumps({'twin@a': {'seconds': 1}, 'twin@b': {'seconds': 2}}))
    ran = repo.run('pipeline', '--jobs', '1')
    assert ran.returncode == 1
    assert ran.stderr.startswith('invertune: twin@b failed: twin: The attack did not take. (log: ')  # the longer one is started first
    assert [(repo.root/f'{n}.txt').read_text() for n in 'ab'] == ['input\n', 'input\n']
    assert 'twin@a' not in ran.stderr  # nothing new was started


def test_interrupt_and_continue(repo):
    "Stopped in the middle of both twins; nothing of them lives on, and the next run finishes."
    (repo.root/'work.sh').write_text('sleep 300; cp first.txt $1.txt')
    run = subprocess.Popen(**repo.command('pipeline', '--jobs', '2'), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: all('Running' in log(repo, f'twin@{n}') for n in 'ab'), run)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and 'interrupted' in err, out + err
    assert 'Running' in log(repo, 'twin@a') and not (repo.root/'a.txt').exists()
    assert not (repo.root/'.cache'/'running.json').exists()
    (repo.root/'work.sh').write_text('cp first.txt $1.txt')
    ran = repo.run('pipeline')
    assert ran.returncode == 0 and '5 stages, 2 up to date' in ran.stdout, ran.stdout + ran.stderr


def log(repo, stage):
    file = repo.root/'.cache'/'logs'/f'{stage}.log'
    return file.read_text() if file.exists() else ''


def until(true, process):
    "Wait for something that a process is to do."
    for _ in range(600):
        if true(): return
        assert process.poll() is None, process.communicate()
        time.sleep(.1)
    process.kill()
    raise AssertionError('it never happened')


def test_changed_inputs_are_refused(repo):
    (repo.root/'data'/'in.txt').write_text('other\n')
    ran = repo.run('pipeline')
    assert ran.returncode == 1 and "'data/' is not what data.dvc pins" in ran.stderr
    assert not (repo.root/'first.txt').exists()


@pytest.mark.parametrize('words, sentence', [
    (('--profile', 'glyhps'), "did you mean 'glyphs'?"),
    (('--jobs', '0'), 'whole number'),
    (('reprot@glyphs',), "did you mean 'report@glyphs'?"),
])
def test_unknown_names(repo, words, sentence):
    before = (repo.root/'params.yaml').read_text()
    ran = repo.run('pipeline', *words)
    assert ran.returncode == 1 and sentence in ran.stderr and len(ran.stderr.splitlines()) == 1
    assert (repo.root/'params.yaml').read_text() == before


def test_profile_switch_keeps_the_rest(repo):
    before = (repo.root/'params.yaml').read_text()
    assert repo.run('pipeline', '--profile', 'smoke').returncode == 0
    assert (repo.root/'params.yaml').read_text() == before.replace('profile: glyphs ', 'profile: smoke ')
