"The scheduler over a real DVC pipeline of small stages: side by side, stopped anywhere, taken up again."
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import yaml

STAGES = {
    'first': {'cmd': 'cat data/in.txt > first.txt', 'deps': ['data'], 'outs': [{'first.txt': {'cache': False}}]},
    'twin': {'matrix': {'attack': ['a', 'b']}, 'cmd': 'sh work.sh ${item.attack}', 'deps': ['first.txt', 'work.sh'],
             'outs': [{'${item.attack}.txt': {'persist': True}}]},
    'poison': {'matrix': {'profile': ['${profile}'], 'attack': ['sig']},
               'cmd': 'python -m invertune.run.stages poison profile=${item.profile} attack=${item.attack}',
               'deps': ['nbs/stages/30_poison.ipynb'], 'params': ['poison'],
               'outs': [{'results/${item.profile}/poison/3/sig/metrics.json': {'persist': True, 'cache': False}}]},
    'report-main': {'matrix': {'profile': ['${profile}']}, 'cmd': 'cat a.txt b.txt > report-${item.profile}.txt',
                    'deps': ['a.txt', 'b.txt'], 'outs': [{'report-${item.profile}.txt': {'cache': False}}]}}


def tool(repo, *words): return subprocess.run(words, cwd=repo.root, check=True, capture_output=True, text=True).stdout


def dvc(repo, *words): return tool(repo, sys.executable, '-m', 'dvc', *words)


@pytest.fixture
def repo(checkout):
    "A checkout with a pipeline."
    (checkout.root/'.gitignore').write_text('/results/smoke/\n/.cache/\n')
    (checkout.root/'.dvcignore').write_text('.DS_Store\n.ipynb_checkpoints\n')
    tool(checkout, 'git', 'init', '-q')
    dvc(checkout, 'init', '-q')
    dvc(checkout, 'config', 'core.analytics', 'false')
    (checkout.root/'data').mkdir()
    (checkout.root/'data'/'in.txt').write_text('input\n')
    dvc(checkout, 'add', '-q', 'data')
    (checkout.root/'work.sh').write_text('cp first.txt $1.txt')
    (checkout.root/'dvc.yaml').write_text(yaml.safe_dump({'stages': STAGES}, sort_keys=False))
    tool(checkout, 'git', 'add', '.')
    tool(checkout, 'git', 'add', '-f', 'data/in.txt')
    tool(checkout, 'git', '-c', 'user.name=t', '-c', 'user.email=t@example.org', 'commit', '-qm', 'all')
    return checkout


def test_run_skip_and_continue(repo):
    "A stage whose inputs come out as before is not run, and plain DVC agrees with the record."
    ran = repo.run('scheduler')
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (repo.root/'report-glyphs.txt').read_text() == 'input\ninput\n'
    assert '5 stages, 1 up to date' in ran.stdout
    assert '5 stages, 5 up to date' in repo.run('scheduler').stdout
    assert 'up to date' in dvc(repo, 'status', 'report-main@glyphs', '--with-deps')
    (repo.root/'work.sh').write_text('cp first.txt $1.txt # as before')
    ran = repo.run('scheduler')
    assert '5 stages, 2 up to date' in ran.stdout and 'report-main' not in ran.stdout
    (repo.root/'work.sh').write_text('cp first.txt $1.txt; echo $1 >> $1.txt')
    assert 'report-main@glyphs done' in repo.run('scheduler').stdout
    assert (repo.root/'report-glyphs.txt').read_text() == 'input\na\ninput\nb\n'


def test_plain_dvc_goes_on(repo):
    "What the scheduler has recorded, `dvc repro` takes for done, and the other way round."
    assert repo.run('scheduler', 'twin@a').returncode == 0
    said = dvc(repo, 'repro', 'report-main@glyphs')
    assert "'twin@a' didn't change" in said and "Running stage 'twin@b'" in said
    assert '5 stages, 5 up to date' in repo.run('scheduler').stdout


def test_failure_says_why_and_keeps_results(repo):
    assert repo.run('scheduler').returncode == 0
    (repo.root/'work.sh').write_text('echo "invertune: twin: The attack did not take." >&2; exit 1')
    costs = repo.root/'results'/'glyphs'/'costs.json'
    known = json.loads(costs.read_text())
    assert {'twin@a', 'twin@b', 'report-main@glyphs'} <= known.keys() and all(c['cpu'] >= 0 < c['peak_mb'] for c in known.values())
    costs.write_text(json.dumps({'twin@a': {'seconds': 1}, 'twin@b': {'seconds': 2}}))
    ran = repo.run('scheduler', '--jobs', '1')
    assert ran.returncode == 1
    assert ran.stderr.startswith('invertune: twin@b failed: twin: The attack did not take. (log: ')  # the longer one first
    assert [(repo.root/f'{n}.txt').read_text() for n in 'ab'] == ['input\n', 'input\n']
    assert 'twin@a' not in ran.stderr  # nothing new was started


def test_a_killed_stage(repo):
    file = repo.root/'params.yaml'
    file.write_text(file.read_text().replace('lr: 1.0e-3', 'lr: 1.0e-3, fail: killed'))
    ran = repo.run('scheduler', 'poison@glyphs-sig')
    assert ran.returncode == 1 and 'killed by signal 9, most likely because memory ran out' in ran.stderr


def test_interrupt_and_continue(repo):
    "Stopped in the middle of both twins; nothing of them lives on, and the next run finishes."
    (repo.root/'work.sh').write_text('echo at work; sleep 300 & wait; cp first.txt $1.txt')
    run = subprocess.Popen(**repo.command('scheduler', '--jobs', '2'), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: all('at work' in log(repo, f'twin@{n}') for n in 'ab'), run)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and 'interrupted' in err, out + err
    assert not (repo.root/'a.txt').exists()
    for _ in range(50):  # what was told to end may still be ending on a busy machine
        if not alive(repo): break
        time.sleep(.1)
    assert not alive(repo)
    (repo.root/'work.sh').write_text('cp first.txt $1.txt')
    ran = repo.run('scheduler')
    assert ran.returncode == 0 and '5 stages, 2 up to date' in ran.stdout, ran.stdout + ran.stderr


def test_orphans_end_by_themselves(repo):
    "The scheduler is killed: its stages end, and the next run does not meet them."
    (repo.root/'work.sh').write_text('echo at work; exec sleep 300')
    run = subprocess.Popen(**repo.command('scheduler', '--jobs', '1'), stdout=subprocess.DEVNULL)
    until(lambda: any('at work' in log(repo, f'twin@{n}') for n in 'ab'), run)
    run.kill(); run.wait()
    (repo.root/'work.sh').write_text('cp first.txt $1.txt')
    ran = repo.run('scheduler')
    assert ran.returncode == 0, ran.stdout + ran.stderr


def log(repo, stage):
    file = repo.root/'.cache'/'logs'/f'{stage}.log'
    return file.read_text() if file.exists() else ''


def alive(repo):
    "Processes that work in this checkout."
    import psutil
    return [p for p in psutil.process_iter(['cwd']) if p.info['cwd'] == str(repo.root)]


def until(true, process):
    "Wait for something that a process is to do."
    for _ in range(600):
        if true(): return
        assert process.poll() is None, process.communicate()
        time.sleep(.1)
    process.kill()
    raise AssertionError('it never happened')


def test_the_same_notebook_warm_and_alone(repo):
    "A fork of the scheduler and a command by hand make the same files."
    folder = repo.root/'results'/'smoke'/'poison'/'3'/'sig'
    assert repo.run('scheduler', '--profile', 'smoke', 'poison@smoke-sig').returncode == 0
    warm = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    assert repo.run('stages', 'poison', 'profile=smoke', 'attack=sig').returncode == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == warm and 'metrics.json' in warm


def test_a_profile_of_ones_own_leaves_the_record_alone(repo):
    "The profile is a variable: neither params.yaml nor dvc.lock changes, and git sees nothing."
    assert repo.run('scheduler', 'poison@glyphs-sig').returncode == 0
    tool(repo, 'git', 'add', '-A')
    before = tool(repo, 'git', 'status', '--porcelain')
    assert repo.run('scheduler', '--profile', 'smoke', 'poison@smoke-sig').returncode == 0
    assert tool(repo, 'git', 'status', '--porcelain') == before and (repo.root/'results'/'smoke'/'dvc.lock').exists()
    assert '1 stages, 1 up to date' in repo.run('scheduler', '--profile', 'smoke', 'poison@smoke-sig').stdout
    assert '1 stages, 1 up to date' in repo.run('scheduler', 'poison@glyphs-sig').stdout


def test_changed_inputs_are_refused(repo):
    (repo.root/'data'/'in.txt').write_text('other\n')
    ran = repo.run('scheduler')
    assert ran.returncode == 1 and "'data/' is not what data.dvc pins (data/in.txt)" in ran.stderr
    (repo.root/'data'/'in.txt').write_bytes(b'input\r\n')
    assert 'data/in.txt has lines that end in CRLF' in repo.run('scheduler').stderr
    assert not (repo.root/'first.txt').exists()


def test_what_file_managers_leave_is_no_input(repo):
    (repo.root/'data'/'.DS_Store').touch()
    (repo.root/'data'/'.ipynb_checkpoints').mkdir()
    (repo.root/'data'/'.ipynb_checkpoints'/'in.txt').write_text('old\n')
    ran = repo.run('scheduler')
    assert ran.returncode == 0, ran.stderr


def test_an_archive_without_git(repo):
    shutil.rmtree(repo.root/'.git')
    ran = repo.run('scheduler')
    assert ran.returncode == 0 and '5 stages, 5 up to date' in repo.run('scheduler').stdout, ran.stderr


def test_a_notebook_that_was_only_saved(repo):
    "JupyterLab writes its version into a notebook that is looked at; that is no reason to make everything again."
    assert repo.run('scheduler', 'poison@glyphs-sig').returncode == 0
    file = repo.root/'nbs'/'stages'/'30_poison.ipynb'
    nb = nbformat.read(file, 4)
    nb.metadata['language_info'] = {'name': 'python', 'version': '3.11'}
    nbformat.write(nb, file)
    ran = repo.run('scheduler', 'poison@glyphs-sig')
    assert ran.returncode == 1 and 'was saved by an editor, its cells are as committed: run nbdev_clean' in ran.stderr
    nb.cells[-1].source += '\n# a change'
    nbformat.write(nb, file)
    assert '1 stages, 0 up to date' in repo.run('scheduler', 'poison@glyphs-sig').stdout


def test_a_module_edited_meanwhile_is_not_recorded(repo):
    "The fork has the old text; DVC would record the new one."
    (repo.root/'work.sh').write_text('cp first.txt $1.txt; echo "# edited" >> work.sh')
    ran = repo.run('scheduler')
    assert ran.returncode == 1 and 'work.sh was edited while the pipeline ran' in ran.stderr
    assert not (repo.root/'dvc.lock').exists() or 'twin@a' not in (repo.root/'dvc.lock').read_text()


@pytest.mark.parametrize('words, sentence', [
    (('--profile', 'glyhps'), "did you mean 'glyphs'?"),
    (('--jobs', '0'), 'whole number'),
    (('report-mian@glyphs',), "did you mean 'report-main@glyphs'?"),
])
def test_unknown_names(repo, words, sentence):
    ran = repo.run('scheduler', *words)
    assert ran.returncode == 1 and sentence in ran.stderr and len(ran.stderr.splitlines()) == 1
