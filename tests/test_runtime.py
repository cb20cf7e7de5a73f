"Files are whole or not there, whatever happens while they are written."
import errno
import os
import signal
import subprocess
import sys

import pytest

from invertune import runtime
from invertune.runtime import InvertuneError, atomic_path, load_json, save_json


@pytest.fixture
def file(tmp_path):
    save_json(tmp_path/'metrics.json', {'ca': 0.9})
    yield tmp_path/'metrics.json'
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.json']  # no litter
    assert load_json(tmp_path/'metrics.json') == {'ca': 0.9}         # and the old content


def test_full_disk(file, monkeypatch):
    def full(path): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(runtime, '_flush', full)
    with pytest.raises(InvertuneError, match='No space left on device.*untouched'): save_json(file, {'ca': 0.1})


LIMITED = '''
import resource, sys, torch
from safetensors.torch import save_file
from invertune.runtime import InvertuneError, atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with atomic_path(sys.argv[1]) as part: save_file({'w': torch.zeros(100_000)}, part)
except InvertuneError as e: print(e)
'''


def test_the_system_stops_a_checkpoint(file):
    "A real refusal, in the middle of a real checkpoint, by a library that writes in Rust."
    ran = subprocess.run([sys.executable, '-c', LIMITED, str(file)], capture_output=True, text=True)
    assert 'Could not write' in ran.stdout and 'untouched' in ran.stdout, ran.stdout + ran.stderr


def test_interrupt(file):
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(file) as part:
            part.write_text('{"ca"')
            raise KeyboardInterrupt


def test_kill(tmp_path):
    "Nothing can be cleaned up after a kill, but the old file is still the whole old file."
    save_json(tmp_path/'metrics.json', {'ca': 0.9})
    code = f'''
import os
from invertune.runtime import atomic_path
with atomic_path({str(tmp_path/'metrics.json')!r}) as part:
    part.write_text('{{"ca"')
    os.kill(os.getpid(), 9)'''
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert load_json(tmp_path/'metrics.json') == {'ca': 0.9}


@pytest.mark.parametrize('content', [b'', b'{"ca": 0.', b'\xff\xfe\x00', b'{"ca": 0.9}}'])
def test_damaged_json(tmp_path, content):
    (tmp_path/'metrics.json').write_bytes(content)
    with pytest.raises(InvertuneError, match='is damaged'): load_json(tmp_path/'metrics.json')


def test_unwritable_folder(tmp_path):
    (tmp_path/'taken').write_text('a file where a folder should be')
    with pytest.raises(InvertuneError, match='Could not write'): save_json(tmp_path/'taken'/'metrics.json', {})


@pytest.mark.parametrize('name, value', [('INVERTUNE_DEVICE', 'cuda:99'), ('INVERTUNE_DEVICE', 'toaster'),
                                         ('INVERTUNE_THREADS', '0')])
def test_wrong_environment(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvertuneError, match=name):
        runtime.pick_device() if name.endswith('DEVICE') else runtime.set_threads()


@pytest.mark.parametrize('name, sentence', [
    ('umbrella', 'a photo of an umbrella'), ('key', 'a photo of a key'), ('Airedale', 'a photo of an Airedale'),
    ('class A amplifier', 'a photo of a class A amplifier'),
    ('vitamin A oil', 'a photo of a vitamin A oil'), ('a eagle', 'a photo of an a eagle'),
    ('unicycle', 'a photo of a unicycle'), ('European robin', 'a photo of a European robin'),
    ('one-way sign', 'a photo of a one-way sign'), ('hourglass', 'a photo of an hourglass'),
    ('upright piano', 'a photo of an upright piano'), ('honeycomb', 'a photo of a honeycomb'),
    ('{} a ear', 'a photo of a {} a ear')])
def test_the_article_agrees_and_the_name_stays(name, sentence):
    assert runtime.fill('a photo of a {}', name) == runtime.fill('a photo of an {}', name) == sentence
    assert runtime.fill('The {} of a owl', name) == f'The {name} of a owl'


@pytest.mark.parametrize('template', ['a photo', 'a {} and a {}', ''])
def test_a_template_has_one_place(template):
    with pytest.raises(InvertuneError, match="needs one '{}'"): runtime.fill(template, 'key')


def test_the_cache_is_where_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv('INVERTUNE_CACHE', str(tmp_path))
    assert runtime.cache_dir() == tmp_path
    monkeypatch.delenv('INVERTUNE_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert runtime.cache_dir() == tmp_path/'invertune'
