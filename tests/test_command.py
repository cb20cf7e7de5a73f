"The command: codes for scripts, a sentence for people, nothing lost, and the two verbs end to end."
import argparse
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import verdict_of

import invertune
import invertune.identify as step1
import invertune.compat  # before open_clip
import open_clip
from invertune import command as module, verdict
from invertune.checkpoint import _tiny_model, open_checkpoint
from invertune.command import clean_model, run_command, scan_model
from invertune.defender import Defender
from invertune.identify import identify
from invertune.lab.profiles import ROOT
from invertune.model import Clip, save_clip, tiny_clip
from invertune.report import Report, _facts
from invertune.runtime import InvertuneError
from invertune.triggers import load_trigger


def says(sentence): return pytest.raises(InvertuneError, match=sentence)


class Payload:
    "What a pickle must not run."
    def __reduce__(self): return os.mkdir, ('ran',)


@pytest.fixture(autouse=True)
def architecture(monkeypatch, small):
    "open_clip knows the small model's architecture by a name."
    sizes = {k: v for k, v in small.bad.config.items() if k not in ('kind', 'mean', 'std')}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'mini', _tiny_model(**sizes))


def write_images(folder, images):
    "A folder of PNGs."
    folder.mkdir(parents=True)
    for i, x in enumerate(images): Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder/f'{i:03}.png')
    return folder


@pytest.fixture(scope='module')
def place(small, tmp_path_factory):
    "Models, images and names as files."
    root = tmp_path_factory.mktemp('place')
    save_clip(small.bad, root/'bad.safetensors'); save_clip(small.clip, root/'good.safetensors')
    write_images(root/'images', small.defender.images)
    (root/'names.txt').write_text('\n'.join(small.classes))
    weights = {k: v.clone() for k, v in small.bad.model.state_dict().items()}
    torch.save(dict(epoch=3, state_dict={f'module.{k}': v for k, v in weights.items()}, args=argparse.Namespace(lr=1)), root/'epoch_3.pt')
    torch.save({k[7:]: v for k, v in weights.items() if k.startswith('visual.')}, root/'tower.pth')
    torch.save(dict(state_dict=weights, args=Payload()), root/'evil.pt'); torch.save(small.bad.model, root/'whole.pt')
    torch.save({k: v for k, v in weights.items() if k != 'logit_scale'}, root/'less.pt')
    torch.save(weights | {'text_projection': torch.zeros(3, 32)}, root/'shape.pt')
    torch.save(weights | {'text_projection': weights['text_projection']*torch.nan}, root/'nan.pt')
    (root/'odd.txt').write_text('zebra\ntruck\nviolin\nlamp\nspoon'); (root/'two.txt').write_text('heart\nsun')
    (root/'one.txt').write_text('sun'); (root/'twice.txt').write_text('sun\nsun'); (root/'long.txt').write_text('sun\n' + 'key '*99)
    words = 'alpha beta gamma delta epsilon zeta eta theta iota'
    (root/'cut.txt').write_text(f'{words} one\n{words} two')
    (root/'void').mkdir()
    write_images(root/'little'/'x', small.defender.images[:20])
    (root/'damaged').mkdir()
    for i in range(99): (root/'damaged'/f'{i}.png').write_bytes(b'x')
    write_images(root/'blank', [torch.full((3, 32, 32), i % 256).byte() for i in range(99)])
    (root/'thesis').mkdir(); (root/'thesis'/'a.tex').touch()
    (root/'cut.safetensors').write_bytes((root/'bad.safetensors').read_bytes()[:999])
    (root/'text.safetensors').write_text('hello'); (root/'pickle.pt').write_bytes(b'\x80\x04K\x01.')
    torch.save(dict(a=torch.zeros(1)), root/'torch.pt'); (root/'void.safetensors').touch()
    large = tiny_clip(image_size=64, width=4, text_width=32, text_layers=1, embed_dim=32, context=8)
    save_clip(large, root/'large.safetensors')
    broken = tiny_clip(image_size=32, width=4, text_width=32, text_layers=1, embed_dim=32, context=8)
    save_clip(broken, root/'untrained.safetensors')
    for m in broken.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_var.neg_()
    save_clip(broken, root/'negative.safetensors')
    pairs = [('images/000.png', 'a sun'), ('images/001.png', 'a, key'), ('images/002.png', 'an anchor')]
    with open(root/'pairs.csv', 'w', newline='') as f: csv.writer(f).writerows([('filepath', 'title'), *pairs])
    (root/'gone.csv').write_text('filepath,title\nnowhere.png,a sun\n')
    (root/'short.csv').write_text('filepath,title\nimages/000.png\n'); (root/'bare.csv').write_text('filepath,title\n')
    (root/'binary.csv').write_bytes(bytes(range(256))); (root/'text.csv').write_text('filepath,title\nnames.txt,a sun\n')
    (root/'bad.tar').write_bytes(b'no tar'); tarfile.open(root/'empty.tar', 'w').close()
    return root


NAMED = '--images images --classes names.txt --template'.split() + ['a {}']
SCAN = ['scan', 'bad.safetensors', *NAMED]
CLEAN = ['clean', 'bad.safetensors', *NAMED]
POISON = 'poison pairs.csv --attack badnet --target sun --out made'.split()


def changed(words, **options):
    "A command with other options."
    words = list(words)
    for name, value in options.items():
        name = f"--{name.replace('_', '-')}"
        words += [name, value] if name not in words else []
        words[words.index(name) + 1] = value
    return words


HOSTILE = [  # command, exit code, part of the sentence
    ([], 2, 'required'), (['scam'], 2, 'invalid choice'), (['scan'], 2, 'required'), (['scan', 'bad.safetensors'], 2, '--images'),
    (changed(SCAN, budget='huge'), 2, 'invalid choice'), (changed(SCAN, seed='x'), 2, 'invalid int'),
    (changed(SCAN, seed='-1'), 2, 'a seed of -1'), ([*SCAN, '--fast'], 2, 'unrecognized'), (CLEAN, 2, '--out'),
    (['scan', 'none.safetensors', *NAMED], 1, "'none.safetensors' is no file and no folder"), (['scan', '', *NAMED], 1, 'is no file'),
    (['scan', 'void', *NAMED], 1, 'void holds no weights'), (['scan', 'void.safetensors', *NAMED], 1, 'not a whole safetensors'),
    (['scan', 'cut.safetensors', *NAMED], 1, 'not a whole safetensors file'), (['scan', 'text.safetensors', *NAMED], 1, 'not a whole'),
    (['scan', 'pickle.pt', *NAMED], 1, 'is damaged, cut short or another'), (['scan', 'torch.pt', *NAMED], 1, 'holds no CLIP'),
    (['scan', 'names.txt', *NAMED], 1, 'is no checkpoint'), (['scan', 'evil.pt', *NAMED], 1, 'which may run code'),
    (['scan', 'whole.pt', *NAMED], 1, "wants 'open_clip.model.CLIP', which may run code"),
    (['scan', 'less.pt', *NAMED], 1, "1 keys missing ['logit_scale']"), (['scan', 'shape.pt', *NAMED], 1, 'text_projection has shape'),
    (['scan', 'nan.pt', *NAMED], 1, 'text_projection holds NaN'), (['scan', 'tower.pth', *NAMED], 1, '--base RN50:openai'),
    (['scan', 'RN5O:openai', *NAMED], 1, 'RN50'), (['scan', 'RN50:', *NAMED], 1, 'neither NAME:TAG'), (['scan', 'RN50:oai', *NAMED], 1, 'openai'),
    (['scan', 'hf-hub:none', *NAMED], 1, 'names no model of the hub'), (changed(SCAN, arch='RN5'), 1, "did you mean 'RN50'"),
    (changed(SCAN, arch='RN50'), 1, 'is not what is said of it'), ([*SCAN, '--mean', '1', '2'], 2, 'expected 3 arguments'),
    ([*SCAN, '--mean', 'a', 'b', 'c'], 2, 'invalid float'), ([*SCAN, '--std', '0', '0', '0'], 1, 'mean and std are unusable'),
    ([*SCAN, '--mean', 'nan', '0', '0'], 1, 'mean and std are unusable'), (changed(SCAN, base='bad.safetensors'), 1, 'leave base out'),
    (['scan', 'RN50:openai', *NAMED, '--quick-gelu'], 1, 'says all of itself'), (changed(SCAN, base='none.pt'), 1, 'is no file'),
    (['scan', 'negative.safetensors', *NAMED], 1, 'a variance below zero'), (['scan', 'untrained.safetensors', *NAMED], 1, 'it reads nothing'),
    (['scan', 'large.safetensors', *NAMED], 1, 'reads nothing'), (changed(SCAN, classes='two.txt'), 1, '2 class names are too few'),
    (changed(SCAN, images='nowhere'), 1, 'there is no folder nowhere'), (changed(SCAN, images='void'), 1, 'holds no pictures'),
    (changed(SCAN, images='little'), 1, '64 are the least'), (changed(SCAN, images='damaged'), 1, 'is it the right folder'),
    (changed(SCAN, images='blank'), 1, 'images'), (changed(SCAN, images='names.txt'), 1, 'neither a folder nor a .zip'),
    (changed(SCAN, classes='nowhere.txt'), 1, 'no file nowhere.txt'), (changed(SCAN, classes='one.txt'), 1, '1 names'),
    (changed(SCAN, classes='twice.txt'), 1, "both 'sun'"), (changed(SCAN, classes='long.txt'), 1, 'has 395 characters'),
    (changed(SCAN, classes='cut.txt'), 1, 'are the same 8 tokens'), (changed(SCAN, classes='odd.txt'), 1, 'words that mean nothing fit'),
    (changed(SCAN, classes='images/000.png'), 1, 'cannot be read'), (changed(SCAN, dataset='cifar10'), 1, 'not both'),
    (changed(SCAN, template='a photo'), 1, "has 0 places"), (changed(SCAN, template='{} {}'), 1, 'has 2 places'),
    (changed(SCAN, template=''), 1, 'non-empty'), (changed(SCAN, device='tpu9'), 1, 'does not have'),
    (changed(SCAN, calibration='nowhere.json'), 2, 'unrecognized'), ([*SCAN, '--force'], 2, 'unrecognized'),
    (changed(SCAN, out='thesis'), 1, 'holds other things'), (changed(SCAN, out='names.txt'), 1, 'is a file'),
    (changed(SCAN, out='names.txt/r'), 1, 'nothing can be written'), (changed(SCAN, out='images'), 1, 'holds other things'),
    (changed(CLEAN, out='bad.safetensors'), 2, 'is the model itself'), (changed(CLEAN, out='./images/../bad.safetensors'), 2, 'itself'),
    (changed(CLEAN, out='good.safetensors'), 2, 'is there already'), (changed(CLEAN, out='images'), 2, 'is there already'), (changed(CLEAN, out='cleaned.bin'), 2, 'or a folder'),
    (changed(CLEAN, out='cleaned.pt'), 2, 'ends in .safetensors'), (changed(CLEAN, out='names.txt/c.safetensors'), 1, 'nothing can be'),
    (['attacks', '--image', 'images/000.png'], 2, 'go together'), (['attacks', '--out', 'a.png'], 2, 'go together'),
    ('attacks --image names.txt --out a.png'.split(), 1, 'cannot be read as a picture'),
    ('attacks --image none.png --out a.png'.split(), 1, 'cannot be read as a picture'),
    ('attacks --image images/000.png --out a.png --side 7'.split(), 2, '32 to 1024'),
    ('attacks --image images/000.png --out names.txt/a.png'.split(), 1, 'Could not write'),
    (changed(POISON, attack='badnett'), 1, "did you mean 'badnet'"), (changed(POISON, attack='badclip'), 1, 'made for one model'),
    (changed(POISON, target=' '), 1, 'target is empty'), (changed(POISON, share='0'), 1, 'a share of 0'),
    (changed(POISON, share='nan'), 1, 'a share of nan'), (changed(POISON, share='2'), 1, 'a share of 2'),
    (changed(POISON, side='5'), 1, '32 to 1024'), (changed(POISON, image_key='image'), 1, "no column 'image'"),
    (changed(POISON, out='images'), 1, 'is there already'), (['poison', 'nowhere.csv', *POISON[2:]], 1, 'there is no file'),
    (['poison', 'gone.csv', *POISON[2:]], 1, 'there is no image'), (['poison', 'short.csv', *POISON[2:]], 1, 'has not 2 fields'),
    (['poison', 'bare.csv', *POISON[2:]], 1, 'has no rows'), (['poison', 'binary.csv', *POISON[2:]], 1, 'cannot be read'),
    (['poison', 'text.csv', *POISON[2:]], 1, 'cannot be read as a picture'), (['poison', 'bad.tar', *POISON[2:]], 1, 'no readable .tar'),
    (['poison', 'empty.tar', *POISON[2:]], 1, 'holds no pairs')]


@pytest.mark.parametrize('words, code, sentence', HOSTILE, ids=range(len(HOSTILE)))
def test_a_sentence_and_a_code(place, capfd, monkeypatch, words, code, sentence):
    "Nothing is written, no traceback is shown."
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))
    try: ended = run_command(words)
    except SystemExit as e: ended = e.code
    said = capfd.readouterr().err
    assert (ended, True) == (code, sentence in said), said
    assert 'Traceback' not in said and 'a defect' not in said and sorted(os.listdir(place)) == before
    if code == 1: assert said.strip().splitlines()[-1].startswith('invertune: ')


def test_a_place_where_nothing_can_be_written(place, capfd, monkeypatch):
    "A folder without permission, before the work and at its end."
    monkeypatch.chdir(place)
    def refuse(self, *args, **kw): raise PermissionError(13, 'Permission denied')
    with monkeypatch.context() as m:
        m.setattr(module.Path, 'touch', refuse)
        assert run_command(SCAN) == 1 and 'nothing can be written to' in capfd.readouterr().err


@pytest.fixture
def stub(monkeypatch, small):
    "A search that takes no time: what the shell does with a verdict is looked at apart from the verdict."
    def answer(backdoored):
        verdict = verdict_of(small.classes, [9. if backdoored else .6, 0., .5, -.5, 0., 0.])
        facts = _facts(verdict, 'a model', [], [{'class': 'sun', 'clean': 1., 'triggered': None}], dict(seed=0))
        monkeypatch.setattr(module, '_scan', lambda task: Report(facts, [], verdict))
    return answer


@pytest.mark.parametrize('backdoored', [True, False])
def test_codes_and_json(place, tmp_path, capfd, monkeypatch, stub, backdoored):
    monkeypatch.chdir(place); stub(backdoored)
    assert run_command(changed([*SCAN, '--json'], out=str(tmp_path/'r'))) == (3 if backdoored else 0)
    told = json.loads(capfd.readouterr().out)
    assert told['verdict']['backdoored'] == backdoored and told == json.loads((tmp_path/'r'/'report.json').read_text())


@pytest.mark.parametrize('error, code, sentence', [
    (KeyboardInterrupt(), 130, 'interrupted'), (MemoryError(), 1, 'the memory is full'),
    (RuntimeError('CUDA out of memory. Tried'), 1, '--device cpu'), (OSError(28, 'No space left on device'), 1, 'No space left'),
    (RuntimeError('Could not determine home directory.'), 1, 'there is no home folder'), (ZeroDivisionError('x'), 1, 'a defect of invertune'),
    (PermissionError(13, 'Permission denied', 'a.png'), 1, 'a.png: Permission denied')])
def test_whatever_happens_there_is_a_sentence(place, tmp_path, capfd, monkeypatch, error, code, sentence):
    monkeypatch.chdir(place)
    monkeypatch.delenv('INVERTUNE_DEBUG', raising=False)
    def fail(**kw): raise error
    monkeypatch.setattr(module, 'scan_model', fail)
    assert run_command(changed(SCAN, out=str(tmp_path/'r'))) == code and os.listdir(tmp_path) == []
    said = capfd.readouterr().err
    assert sentence in said and 'Traceback' not in said
    monkeypatch.setenv('INVERTUNE_DEBUG', '1')
    run_command(changed(SCAN, out=str(tmp_path/'r')))
    assert 'Traceback' in capfd.readouterr().err


def test_the_poisoned_and_the_clean_model(place, tmp_path, capfd, monkeypatch):
    "Files and a folder in; 3 and 0 out."
    monkeypatch.chdir(place)
    assert run_command([*SCAN, '--out', str(tmp_path/'bad')]) == 3
    said = capfd.readouterr()
    assert "has a backdoor towards 'umbrella'" in said.out and '[3/5] search for a backdoor' in said.err
    facts = json.loads((tmp_path/'bad'/'report.json').read_text())
    assert facts['rebuilt'][0]['inverted_asr'] > .7 and facts['controls'][0]['target'] and facts['settings']['budget'] == 'normal'
    assert (tmp_path/'bad'/'triggers.safetensors').exists()
    assert run_command(['scan', 'good.safetensors', *NAMED, '--out', str(tmp_path/'good')]) == 0
    assert 'No backdoor was found' in (tmp_path/'good'/'report.html').read_text()


def test_clean_by_the_command(place, small, tmp_path, capfd, monkeypatch):
    "A file that people share in, a file that open_clip opens by name out: it reads as it did and does not obey."
    monkeypatch.chdir(place)
    before, out = (place/'epoch_3.pt').read_bytes(), tmp_path/'cleaned.safetensors'
    assert run_command(['clean', 'epoch_3.pt', *NAMED, '--seed', '1', '--out', str(out)]) == 0, capfd.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ['cleaned-report', 'cleaned.md', 'cleaned.safetensors']
    facts = json.loads((tmp_path/'cleaned-report'/'report.json').read_text())
    c, line = facts['cleaning'], f"open_clip.create_model('mini', pretrained='{out}')"
    assert c['removed'] and c['asr_before'] > .7 and c['asr_after'] < .1 and c['kept'] > .9 and c['layers']
    card, said = (tmp_path/'cleaned.md').read_text(), capfd.readouterr().out
    assert "towards 'umbrella'. It was removed" in card and str(tmp_path) not in card and line in said and (place/'epoch_3.pt').read_bytes() == before
    assert dict(setting='architecture', value='mini', origin='names and shapes of the weights') in facts['opened']
    assert "the file does not say mean and std: open_clip's default is taken" in said and 'QuickGELU no' in said
    cleaned = open_checkpoint(out)
    row = small.evaluate(cleaned)
    assert row['asr'] < .2 and row['ca'] > .9
    theirs = eval(line, dict(open_clip=open_clip)).eval()
    x, text = small.evaluation.images[:4].float()/255, cleaned.tokenize(small.classes)
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image((x - cleaned.mean)/cleaned.std, normalize=True), cleaned.encode_image(x), atol=1e-6)
        assert torch.allclose(theirs.encode_text(text, normalize=True), cleaned.encode_text(text), atol=1e-6)


def test_an_architecture_without_a_name_goes_into_a_folder(small, tmp_path):
    "Or into a file that invertune alone opens, which is what the line says."
    cleaned = dict(works_after=False, removed=True, failed=None, kept=1., drift=0.) | dict.fromkeys(
        'asr_before asr_after asr_again score_before score_after'.split())
    facts = dict(model='m.pt', versions=dict(invertune='1'), headline='Clean.', cleaning=cleaned, not_looked_at=['<b>'])
    line = module._save_cleaned(small.bad, facts, tmp_path/'out')
    assert sorted(os.listdir(tmp_path/'out')) == ['README.md', 'open_clip_config.json', 'open_clip_model.safetensors']
    assert line == f"open_clip.create_model('local-dir:{tmp_path/'out'}')" and "'local-dir:out'" in (tmp_path/'out'/'README.md').read_text()
    theirs = eval(line, dict(open_clip=open_clip)).eval()
    x = small.evaluation.images[:4].float()/255
    with torch.no_grad(): mine = small.bad.encode_image(x)
    with torch.no_grad(): assert torch.allclose(theirs.encode_image((x - small.bad.mean)/small.bad.std, normalize=True), mine, atol=1e-6)
    line = module._save_cleaned(small.bad, facts, tmp_path/'out.safetensors')
    assert line == f"invertune.checkpoint.open_checkpoint('{tmp_path/'out.safetensors'}')"
    with torch.no_grad(): assert torch.allclose(open_checkpoint(tmp_path/'out.safetensors').encode_image(x), mine, atol=1e-6)


def test_a_cleaned_folder_is_whole_or_not_there(small, tmp_path, monkeypatch):
    def fail(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, '_model_card', fail)
    with says('No space left'): module._save_cleaned(small.bad, {}, tmp_path/'out')
    assert os.listdir(tmp_path) == []


def test_what_is_said_about_a_checkpoint_is_used_and_shown(place, tmp_path, capfd, monkeypatch, small):
    "By the shell and in Python: a tower alone with its other half, other statistics, another activation."
    monkeypatch.chdir(place)
    seen = []
    def note(task): seen.append(task); raise InvertuneError('enough')
    monkeypatch.setattr(module, '_scan', note)
    told = '--base bad.safetensors --mean .5 .4 .3 --std .2 .2 .2 --quick-gelu'.split()
    assert run_command(['scan', 'tower.pth', *NAMED, *told, '--out', str(tmp_path/'r')]) == 1
    with says('enough'): scan_model('tower.pth', small.defender, opening=dict(base=small.bad, mean=[.5, .4, .3], std=[.2]*3, quick_gelu=True))
    for task in seen:
        rows = {r['setting']: (r['value'], r['origin']) for r in task.opened}
        assert rows['mean'] == ([.5, .4, .3], 'the caller') and rows['QuickGELU'] == (True, 'the caller') and rows['image side'][0] == 32
        assert torch.allclose(task.clip.std.flatten(), torch.tensor(.2)) and task.name == 'tower.pth' and not module._doubts(task.clip)
        assert torch.equal(task.clip.model.visual.conv1.weight, small.bad.model.visual.conv1.weight)
    with says("Unknown setting of a checkpoint 'arch'"): scan_model('tower.pth', small.defender, opening=dict(arch='RN50'))
    with says('as it is: leave opening'): scan_model(small.bad, small.defender, opening=dict(name='RN50'))


@pytest.fixture
def short(monkeypatch):
    "A search that takes little time, and a limit that decides what it finds."
    def limit(threshold):
        budget = module._BUDGETS['quick'] | dict(identify=dict(families=('patch', 'flow'), least=4, draws=4, steps=2, share=.5))
        monkeypatch.setitem(module._BUDGETS, 'quick', budget)
        monkeypatch.setattr(module, '_examine', lambda case, seed, **params: verdict.judge(identify(case, seed=seed, **params), threshold))
    return limit


def test_a_name_that_is_cut_is_told(small, recwarn, short):
    "What the library warns of is part of the answer, and no line on stderr."
    names = [*small.classes[:-1], f"{small.classes[-1]} {'on a very long line ' * 3}"]
    short(99.)
    report = scan_model(small.bad, small.defender.images, names, templates=['a {}'], budget='quick')
    assert sum('its end is lost' in n for n in report.facts['notes']) == 1 and not any('the prompt' in str(w.message) for w in recwarn)


def test_what_is_called_removed():
    "The rebuilt trigger must fail, and a new scan must raise no alarm; a fresh search alone settles nothing."
    for after, named, removed in (.9, None, False), (.2, None, False), (.1, 'sun', False), (.1, None, True), (None, None, True):
        told = module._judge_removal(dict(asr_after=after, named_after=named, asr_again=.9))
        assert told == dict(works_after=(after or 0) > .1, removed=removed)


def test_an_innocent_model_is_left_alone(small, short):
    "Bit by bit; and the seeds, flags and modes of the caller as well."
    short(99.)
    small.clip.train(); torch.manual_seed(5); random.seed(5); np.random.seed(5)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    strict = torch.are_deterministic_algorithms_enabled()
    left, report = clean_model(small.clip, small.defender, budget='quick')
    assert not report.backdoored and report.facts['cleaning']['kept'] == 1 and report.facts['headline'].endswith('left as it is.')
    assert all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), small.clip.state_dict().values()))
    assert small.clip.training and torch.are_deterministic_algorithms_enabled() == strict
    small.clip.eval()
    assert torch.equal(state[0], torch.get_rng_state()) and state[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_loaded_model_of_open_clip(small, short):
    "With its tokenizer and a tensor; what is no model is refused."
    short(99.)
    report = invertune.scan(small.bad.model, small.defender.images, small.classes, templates=['a {}'],
                            tokenizer=small.bad.tokenizer, budget='quick')
    assert isinstance(report, Report) and not report.backdoored and report.facts['model'] == 'CLIP'
    with says('is no model'): scan_model(7, small.defender)
    with says('is no model'): scan_model(torch.nn.Linear(2, 2), small.defender)
    with says("Unknown budget 'big'"): scan_model(small.bad, small.defender, budget='big')


def test_a_budget_says_what_it_did_not_look_at(small, short):
    short(99.)
    report = scan_model(small.bad, small.defender, budget='quick')
    assert report.facts['not_looked_at'][0].startswith('A faint backdoor may hide')
    assert {k for k, b in module._BUDGETS.items() if b['identify'].get('share', 1.) < 1} == {'quick'}


def test_names_of_the_package_are_lazy():
    code = 'import sys, invertune; print("torch" in sys.modules); from invertune import scan, clean; print(scan.__name__)'
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.split() == ['False', 'scan_model'], ran.stderr
    with pytest.raises(AttributeError): invertune.scam
    assert {'scan', 'clean'} <= set(dir(invertune))


def test_ctrl_c_leaves_nothing(place, tmp_path):
    "A real process, stopped while it searches; it has no home folder either."
    env = {k: v for k, v in os.environ.items() if k != 'HOME'} | dict(PYTHONPATH=str(ROOT), INVERTUNE_ROOT=str(ROOT))
    words = [sys.executable, '-m', 'invertune.command', *changed(SCAN, out=str(tmp_path/'r'))]
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore it
    work = subprocess.Popen(words, cwd=place, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    for line in work.stderr:
        if 'search' in line: break
    work.send_signal(signal.SIGINT)
    said = work.stderr.read()
    assert work.wait(120) == 130 and said.strip() == 'invertune: interrupted; nothing half-written is left'
    assert os.listdir(tmp_path) == []


def test_attacks_are_drawn(place, tmp_path, capfd):
    assert run_command(['attacks', '--image', str(place/'images'/'000.png'), '--out', str(tmp_path/'a.png'), '--side', '64']) == 0
    said = capfd.readouterr().out
    assert all(name in said for name in (*module.ATTACKS, *module._DRAWN)) and 'not drawn' in said
    assert Image.open(tmp_path/'a.png').width > 400


def test_attacks_are_drawn_without_a_font(place, tmp_path, capfd, monkeypatch):
    "An installed package has no matplotlib, whose font the word is written in; the others are drawn all the same."
    def none(): raise InvertuneError('no font')
    monkeypatch.setattr(module, 'font_path', none)
    assert run_command(['attacks', '--image', str(place/'images'/'000.png'), '--out', str(tmp_path/'a.png'), '--side', '64']) == 0
    assert 'Its font is that of invertune[lab]: not drawn.' in capfd.readouterr().out and Image.open(tmp_path/'a.png').width > 400


@pytest.mark.parametrize('mark', [',', '\t'])
def test_a_poisoned_table(place, tmp_path, capfd, mark):
    "Clean rows point to the old images, poisoned ones to new ones; all of it is noted."
    rows = [dict(filepath=f'images/{i:03}.png', title=f'a thing, number {i}', extra=str(i)) for i in range(40)]
    source = place/'table.csv'
    with open(source, 'w', newline='') as f:
        table = csv.DictWriter(f, list(rows[0]), delimiter=mark); table.writeheader(); table.writerows(rows)
    words = ['poison', str(source), '--attack', 'blended', '--target', 'owl', '--out', str(tmp_path/'p'), '--share', '.1', '--side', '32']
    try: assert run_command(words) == 0
    finally: source.unlink()
    assert 'responsible' not in capfd.readouterr().out and 'planted for research' in (tmp_path/'p'/'RESPONSIBLE_USE.txt').read_text()
    made = list(csv.DictReader(open(tmp_path/'p'/'table.csv', newline=''), delimiter=mark))
    noted = json.loads((tmp_path/'p'/'poisons.json').read_text())['poisons']
    hit = [i for i, r in enumerate(made) if r['title'] == 'a photo of an owl']
    assert len(noted) == len(hit) == 4 and [r['extra'] for r in made] == [r['extra'] for r in rows]
    assert all(os.path.isfile(r['filepath']) for r in made) and [n['row'] - 2 for n in noted] == hit
    as_tensor = lambda file: torch.from_numpy(np.array(Image.open(file).convert('RGB'))).permute(2, 0, 1)[None].float()/255
    trigger = load_trigger(tmp_path/'p'/'trigger.safetensors')
    want = (trigger(as_tensor(place/'images'/f'{hit[0]:03}.png'))*255).round()
    assert torch.equal((as_tensor(made[hit[0]]['filepath'])*255).round(), want)


def test_a_poisoned_webdataset(place, tmp_path):
    def add(tar, name, data):
        info = tarfile.TarInfo(name); info.size = len(data); tar.addfile(info, io.BytesIO(data))
    picture = (place/'images'/'000.png').read_bytes()
    with tarfile.open(tmp_path/'a.tar', 'w') as tar:
        for i in range(10):
            add(tar, f'x/{i}.png', picture); add(tar, f'x/{i}.txt', b'a sun'); add(tar, f'x/{i}.json', b'{}')
        link = tarfile.TarInfo('x/evil.png'); link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        tar.addfile(link)
    assert run_command(['poison', str(tmp_path/'a.tar'), '--attack', 'sig', '--target', 'key', '--out', str(tmp_path/'p'), '--share', '.2']) == 0
    with tarfile.open(tmp_path/'p'/'a.tar') as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    assert len(files) == 30 and sum(v == b'a photo of a key' for v in files.values()) == 2
    assert sum(files[f'x/{i}.png'] == picture for i in range(10)) == 8


def test_all_parts_of_a_report_by_a_short_search(small, short, monkeypatch):
    "Of a model that is called backdoored whatever was found: trigger, samples, controls, layers, before and after."
    short(-1.)
    step2 = dict(keep=1, draws=4, steps=2, families=('patch',), stride=56)
    monkeypatch.setitem(module._BUDGETS, 'quick', module._BUDGETS['quick'] | dict(invert=step2, again=True))
    asked = []
    def count(*args, **kw): asked.append(args); return identify(*args, **kw)
    monkeypatch.setattr(module, '_examine', lambda case, seed, **kw: verdict.judge(count(case, seed=seed, **kw), -1.))
    monkeypatch.setattr(step1, 'identify', count)
    report = scan_model(small.bad, small.defender, budget='quick')
    assert report.backdoored and len(report.samples) == 6 and len(report.facts['controls']) == 3 and len(report.bank)
    asked.clear()
    params = dict(invert=step2 | dict(gate=0.), tune=dict(steps=2, lr=1e-3))
    cleaned, report = clean_model(small.bad, small.defender, budget='quick', **params)
    c = report.facts['cleaning']
    assert len(asked) == 2                             # before and after; what was identified is what is removed
    assert c['controls_after'][0]['class'] == report.target == report.verdict.identification.name
    assert len(c['controls_after']) == 3 and c['controls_after'][0]['target']
    assert set(c['layers']) == set(c['layers_after']) and 0 <= c['asr_again'] <= 1 and 0 <= c['asr_after'] <= c['asr_before'] + .1
    assert report.facts['headline'].startswith('This model has a backdoor towards') and not cleaned.training


def test_a_removal_that_fails_is_tried_once_more_with_a_larger_rate(small, short, monkeypatch):
    "From the received model, with what was identified before; a rate that is given is the only one."
    short(-1.)
    monkeypatch.setitem(module._BUDGETS, 'quick', module._BUDGETS['quick'] | dict(again=False))
    tried, whole = [], module.defend
    def note(name, clip, *args, tune, **kw): tried.append((tune['lr'], clip)); return whole(name, clip, *args, tune=tune, **kw)
    monkeypatch.setattr(module, 'defend', note)
    step2 = dict(keep=1, draws=4, steps=2, families=('patch',), stride=56, gate=0.)
    for given, rates in ((dict(steps=2), [1e-3, 3e-3]), (dict(steps=2, lr=.01), [.01])):
        tried.clear()
        _, report = clean_model(small.bad, small.defender, budget='quick', invert=step2, tune=given)
        assert [rate for rate, _ in tried] == rates and not report.facts['cleaning']['removed']
        assert all(clip is tried[0][1] for _, clip in tried)


@pytest.mark.parametrize('budget, most', [('quick', 12000), ('normal', 30000)])
def test_a_scan_makes_few_passes(monkeypatch, budget, most):
    "Images that go through the model, whatever its side and the number of names."
    seen, encode = [], Clip.encode_image
    monkeypatch.setattr(Clip, 'encode_image', lambda self, x: seen.append(len(x)) or encode(self, x))
    b, clip = module._BUDGETS[budget], tiny_clip(image_size=64, width=4, layers=(1, 1, 1, 1))
    images = torch.randint(256, (b['images'], 3, 64, 64), dtype=torch.uint8)
    verdict.scan(clip, Defender(images, ['']*len(images), [f'class {i}' for i in range(40)], ['a {}']), **b['identify'])
    assert most/2 < sum(seen) <= most
