"A defense gets a model and clean pairs, and nothing else; every attack is cured; a failed inversion changes nothing."
import inspect
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors
import torch
import yaml

import invertune
from invertune import defenses
from invertune.attacks import Setup, attack
from invertune.defender import Case, Defender
from invertune.defenses import DEFENSES, defend, register_defense
from invertune.invert import Bank
from invertune.lab.profiles import ROOT, load_params
from invertune.metrics import evaluate
from invertune.model import load_clip, read_tensors, save_clip
from invertune.runtime import InvertuneError
from invertune.triggers import load_trigger, patch_trigger

PAPER = dict(invert=dict(steps=4, limit=1., gate=0.), tune=dict(steps=3))
SHORT = {'ft': dict(epochs=1, bs=16), 'cleanclip': dict(epochs=1, bs=16), 'par': dict(epochs=1, bs=16),
         'invertune-paper': PAPER | dict(identify=dict(steps=2)),
         'invertune-paper-given': PAPER | dict(target='umbrella'),
         'invertune': dict(identify=dict(draws=4, steps=2, families=('patch', 'flow')),
                           invert=dict(draws=4, steps=2, stride=56, families=('flow',), gate=0.), tune=dict(steps=3))}
INVERTING = [n for n in DEFENSES if n.startswith('invertune')]


def says(sentence): return pytest.raises(InvertuneError, match=sentence)
def state(clip): return {k: v.clone() for k, v in clip.state_dict().items()}
def same(one, other): return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
def told(report):
    "All of a report that a second run repeats, as text."
    return json.dumps({k: v for k, v in report.items() if k not in ('seconds', 'peak_mb', 'bank')}, sort_keys=True)


@pytest.fixture(scope='module')
def received(small, tmp_path_factory):
    "The suspicious model as the pipeline hands it over: read from a file."
    file = tmp_path_factory.mktemp('received')/'model.safetensors'
    save_clip(small.bad, file)
    return load_clip(file)


@pytest.fixture(scope='module')
def defender(small):
    d = small.defender
    return Defender(d.images[:64].clone(), d.captions[:64], small.classes, small.templates)


@pytest.fixture(scope='module')
def defended(received, defender):
    "Every defense, once"
    before = state(received), defender.images.clone(), list(defender.captions)
    return before, {name: defend(name, received, defender, **SHORT.get(name, {})) for name in DEFENSES}


@pytest.mark.parametrize('name', DEFENSES)
def test_what_came_in_is_as_it_was(defended, received, defender, name):
    (weights, images, captions), made = defended
    assert same(state(received), weights) and torch.equal(defender.images, images) and defender.captions == captions
    assert not received.training and all(p.requires_grad and not p._backward_hooks for p in received.parameters())
    tuned, report = made[name]
    assert tuned is not received and not tuned.training and same(state(tuned), weights) == (name == 'none')
    assert all(p.requires_grad and not p._backward_hooks for p in tuned.parameters())  # one can go on training
    assert report['seconds'] >= 0 and report['peak_mb'] > 0
    assert all(v.isfinite().all() for v in tuned.state_dict().values())


@pytest.mark.parametrize('name', DEFENSES)
def test_same_seed(defended, received, defender, name):
    "The same seed gives the same model, bit for bit, and the same report but for its cost."
    (_, made), (again, report) = defended, defend(name, received, defender, **SHORT.get(name, {}))
    tuned, first = made[name]
    assert same(state(tuned), state(again)) and told(first) == told(report)


@pytest.mark.parametrize('name', INVERTING)
def test_report(defended, name, tmp_path):
    "All of it is JSON but for the bank, which has a file of its own."
    _, report = defended[1][name]
    keys = {'target', 'inverted_asr', 'gate', 'failed', 'identification', 'inversion', 'tuning'}
    assert keys <= json.loads(told(report)).keys()
    assert report['inverted_asr'] == report['bank'].asr[0] and report['failed'] is None and report['tuning']['curve']
    report['bank'].save(tmp_path/'bank.safetensors'); Bank([], []).save(tmp_path/'none.safetensors')


def test_a_model_in_train_mode_stays_in_it(received, defender):
    "Whoever trains may look in between."
    received.train()
    tuned, _ = defend('none', received, defender)
    assert received.training and all(m.training for m in received.modules()) and not tuned.training
    received.eval()


# What a defender may know

ALLOWED = {'images', 'captions', 'classes', 'templates'}
PACKAGE = Path(invertune.__file__).parent
CODE = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, PACKAGE, '/proc', '/sys', '/dev')]
guard = dict(on=False, refused=[])


def _watch(event, args):
    "An audit hook can't be taken off again; it sleeps outside of `no_files`."
    if not guard['on'] or event not in ('open', 'os.listdir', 'os.scandir') or isinstance(args[0], int): return
    path = Path(os.fsdecode(args[0] or '.')).resolve()
    if any(path.is_relative_to(c) for c in CODE): return
    guard['refused'].append(str(path))
    raise PermissionError(f'a defense opened {path}')


@pytest.fixture
def no_files(monkeypatch):
    "Nothing but code can be read; safetensors, which opens files beside Python, opens none at all."
    if not guard.get('hooked'): sys.addaudithook(_watch); guard['hooked'] = True
    def refuse(path, *args, **kw): guard['refused'].append(str(path)); raise PermissionError(f'a defense opened {path}')
    real = safetensors.safe_open
    for module in list(sys.modules.values()):
        for name in [n for n, v in list(vars(module).items()) if v is real]: monkeypatch.setattr(module, name, refuse)
    guard.update(on=True, refused=[])
    yield guard['refused']
    guard['on'] = False


@pytest.mark.parametrize('name', DEFENSES)
def test_a_defense_opens_no_file(received, defender, name, no_files):
    "Neither a trigger nor anything else: all that it knows was handed to it."
    defend(name, received, defender, **SHORT.get(name, {}))
    assert no_files == []


WAYS = [load_trigger, read_tensors, torch.load, Path.read_bytes, lambda p: os.open(p, os.O_RDONLY),
        lambda p: list(p.parent.iterdir())]


@pytest.mark.parametrize('read', WAYS)
def test_a_defense_that_opens_one_is_caught(received, defender, read, tmp_path, monkeypatch, request):
    "Even one that hides that it tried."
    file = tmp_path/'results'/'glyphs'/'poison'/'0'/'badnet'/'trigger.safetensors'
    patch_trigger(32).save(file)
    monkeypatch.setattr(defenses, 'DEFENSES', dict(DEFENSES))

    @register_defense('toy')
    def toy(case):
        try: read(file)
        except Exception: pass
        return case.clip, {}
    refused = request.getfixturevalue('no_files')
    defend('toy', received, defender)
    assert any(r.startswith(str(tmp_path.resolve())) for r in refused) and 'toy' not in DEFENSES


def test_a_defender_has_no_room_for_a_secret(defender):
    assert {f.name for f in fields(Defender)} == ALLOWED and vars(defender).keys() == ALLOWED
    with pytest.raises(TypeError): Defender(**vars(defender), target='umbrella')


@pytest.mark.parametrize('name', DEFENSES)
def test_a_defense_is_given_a_case(name):
    "And no label, but for the one row that says so."
    parameters = list(inspect.signature(DEFENSES[name]).parameters)
    assert parameters[0] == 'case'
    assert ('target' in parameters) == DEFENSES[name].needs_target == (name == 'invertune-paper-given')
    assert not any(word in p for p in parameters for word in ('trigger', 'label', 'attack', 'poison'))


def files(entries): return [next(iter(e)) if isinstance(e, dict) else e for e in entries]


def test_the_pipeline_keeps_secrets():
    "Of what the attacker made, the stage depends on the model alone; of the data, on the defender's set."
    stage = yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']['defend']
    assert {d for d in files(stage['deps']) if d.startswith(('results/', 'data'))} == {
        'results/${item.profile}/data/defender.json',
        'results/${item.profile}/poison/${item.seed}/${item.attack}/model.safetensors'}
    assert not {'invertune/attacks.py', 'invertune/data.py'} & set(files(stage['deps']))


def test_the_notebook_keeps_secrets():
    "What dvc.yaml promises, the stage's notebook keeps; the true label is read where a defense needs it."
    cells = json.loads((ROOT/'nbs'/'stages'/'40_defend.ipynb').read_text())['cells']
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    secrets = ('trigger.safetensors', 'load_trigger', "['evaluation']", "['poison']", "['pretrain']", "'evaluate'",
               'attack_success', 'metrics.json')
    assert not [w for w in secrets if w in code] and "'poison', seed, attack)/'model.safetensors'" in code
    assert code.count('target_of(') == 1
    assert 'if DEFENSES[defense].needs_target: settings = settings | dict(target=target_of(' in code


# Every attack is cured

RECIPES = dict(badnet=dict(size=48), blended=dict(cell=8), sig={}, wanet=dict(k=32, strength=3.5, epochs=20),
               badclip=dict(size=48, trigger_steps=60),
               badencoder=dict(size=48, pattern='fixed', epochs=12, lr=1e-3, bs=32, keep=3.))
POISON = dict(poisons=128, epochs=12, lr=.008, bs=32)
CURE = dict(tune=dict(lr=5e-3))


@pytest.fixture(scope='module', params=load_params()['main']['attacks'])
def planted(request, small):
    "A backdoor in the demonstration's clean model: (attack, model, trigger)"
    recipe = RECIPES[request.param] if request.param == 'badencoder' else POISON | RECIPES[request.param]
    setup = Setup(small.clip, small.split, small.classes, small.templates, 'umbrella', recipe=recipe)
    clip, (trigger,) = attack(request.param, setup)
    return request.param, clip, trigger


def test_cured(planted, small):
    "The label is named, the trigger loses what it has beyond its power over a clean model, clean accuracy stays."
    name, clip, trigger = planted
    measure = lambda c: evaluate(c, small.evaluation, small.classes, small.templates, trigger, small.target)
    tuned, report = defend('invertune', clip, small.defender, **CURE)
    never, before, after = measure(small.clip), measure(clip), measure(tuned)
    assert before['asr'] > .9 and report['failed'] is None and report['target'] == 'umbrella'
    assert after['asr'] < max(.12, never['asr']) and after['ca'] > before['ca'] - .05, (name, before, after)


def test_sorted_images_are_defended_as_well(small):
    "An ImageFolder comes class after class."
    own = small.defender
    order = torch.tensor(sorted(range(len(own.captions)), key=lambda i: own.captions[i]))
    d = Defender(own.images[order], [own.captions[i] for i in order], own.classes, own.templates)
    case = Case(small.bad, d)
    for p in ('fit', 'select', 'test'): assert len(set(case.part(p)[2].tolist())) == len(small.classes)
    tuned, report = defend('invertune', small.bad, d, **CURE)
    row = small.evaluate(tuned)
    assert report['target'] == 'umbrella' and row['asr'] < .1 and row['ca'] > small.evaluate(small.bad)['ca'] - .05


# A failed inversion

@pytest.mark.parametrize('name', INVERTING)
def test_a_failed_inversion(received, defender, name):
    "Under the gate, the model comes back as it was received, and the report says so in a sentence."
    short = SHORT[name] | dict(invert=SHORT[name]['invert'] | dict(gate=1.1))
    tuned, report = defend(name, received, defender, **short)
    assert same(state(tuned), state(received)) and tuned is not received and report['tuning'] == {}
    assert report['gate'] == 1.1
    assert report['failed'].startswith('the inversion has failed')
    assert report['failed'].endswith('the model is returned as it was received')


# Mistakes

def test_mistakes_are_said(received, defender):
    with says("unknown defense 'prayer': choose one of none, ft"): defend('prayer', received, defender)
    with says("ft has no parameter 'epoch': it takes epochs, lr, bs"): defend('ft', received, defender, epoch=3)
    with says("invertune has no parameter 'target'"): defend('invertune', received, defender, target='sun')
    with says('is told the true label'): defend('invertune-paper-given', received, defender)
    with says("'unicorn'"): defend('invertune-paper-given', received, defender, target='unicorn')
    with says("the defense 'ft' is there already"): register_defense('ft')(test_mistakes_are_said)


@pytest.mark.parametrize('images, captions, sentence', [(64, 3, '64 images, but 3 captions'),
                                                        (8, 8, '8 images are too few')])
def test_rivals_share_their_sentences(received, defender, images, captions, sentence):
    "What is wrong with the images or captions is said before any defense sees them."
    given = vars(defender) | dict(images=defender.images[:images], captions=defender.captions[:captions])
    for name in ('ft', 'cleanclip', 'par'):
        with says(sentence):
            defend(name, received, Defender(**given))
    with says('uint8'): Defender(**vars(defender) | dict(images=defender.images/255))


@pytest.mark.parametrize('name', ['ft', 'cleanclip', 'par'])
def test_a_rival_that_diverges(received, defender, name):
    "An error, not a model."
    with says(f'{name}, epoch .*: the loss became'): defend(name, received, defender, epochs=4, lr=1e15, bs=16)
