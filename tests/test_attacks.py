"What an attacker changes, and what he leaves alone."
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from invertune import attacks
from invertune.attacks import (ATTACKS, Setup, attack, check_attack, demo_split, poison_pairs, register_attack,
                               train_poisoned)
from invertune.lab.profiles import load_params
from invertune.metrics import _attack_success, evaluate
from invertune.model import pixels, write_tensors
from invertune.runtime import InvertuneError
from invertune.triggers import Trigger, load_trigger, patch_trigger

SIX = load_params()['main']['attacks'] # other suites enter more
SHORT = dict(poisons=8, epochs=1, lr=1e-4, bs=16)
RECIPES = {'badencoder': dict(epochs=1, bs=16), 'badclip': dict(SHORT, trigger_steps=2)}


def says(sentence): return pytest.raises(InvertuneError, match=sentence)
def state(clip): return {k: v.clone() for k, v in clip.state_dict().items()}
def same(one, other): return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture(scope='module')
def setup(small):
    "Few pairs, and the clean model that the demonstration started from"
    return Setup(small.clip, demo_split(48, 5*10**6), small.classes, small.templates, 'umbrella')


def run(name, setup, seed=0):
    return attack(name, replace(setup, seed=seed, recipe=RECIPES.get(name, SHORT)))


@pytest.fixture(scope='module')
def attacked(setup):
    "Every attack, once"
    before = state(setup.clip), setup.split.images.clone(), list(setup.split.captions)
    made = {name: run(name, setup) for name in SIX}
    return before, made


@pytest.mark.parametrize('name', SIX)
def test_attack(attacked, setup, name, tmp_path):
    "A model that differs, a trigger that says what it is and survives its file; what came in is as it was."
    (weights, images, captions), made = attacked
    clip, (trigger,) = made[name]
    assert same(state(setup.clip), weights) and torch.equal(setup.split.images, images)
    assert setup.split.captions == captions
    assert not same(state(clip), weights) and not clip.training
    assert trigger.meta | dict(attack=name, target='umbrella', seed=0) == trigger.meta
    x = pixels(setup.split.images[:8])
    trigger.save(tmp_path/'trigger.safetensors')
    y = load_trigger(tmp_path/'trigger.safetensors')(x)
    assert torch.equal(y, trigger(x)) and y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and not torch.equal(x, y)


@pytest.mark.parametrize('name', ['badnet', 'badencoder', 'badclip'])
def test_same_seed(attacked, setup, name):
    "The same seed gives the same model and the same trigger, bit for bit; another one does not."
    (clip, (trigger,)), (again, (trigger2,)), (other, _) = attacked[1][name], run(name, setup), run(name, setup, seed=1)
    assert same(state(clip), state(again)) and same(trigger.tensors, trigger2.tensors)
    assert not same(state(clip), state(other))


def test_a_new_attack_is_one_function(setup, monkeypatch):
    "It may have several triggers; one with a target of its own keeps it. A name that is taken is refused."
    monkeypatch.setattr(attacks, 'ATTACKS', dict(ATTACKS))

    @register_attack('toy')
    def toy(setup, size=16, **recipe):
        first, second = (patch_trigger(setup.side, s, size) for s in (0, 1))
        second.meta['target'] = 'anchor'
        return train_poisoned(setup, first, **recipe), [first, second]
    clip, triggers = attack('toy', replace(setup, seed=3, recipe=dict(SHORT, size=48)))
    assert [t.meta for t in triggers] == [dict(attack='toy', target=t, seed=3) for t in ('umbrella', 'anchor')]
    assert not clip.training
    register_attack('toy')(toy)  # the same one again, as a notebook does
    with says("the attack 'toy' is there already"): register_attack('toy')(attacks.badnet)
    assert 'toy' not in ATTACKS


def test_badencoder_leaves_the_text_tower_alone(attacked):
    "Its attacker has no captions. BatchNorm's statistics stay too: he trains in eval mode."
    (before, _, _), made = attacked
    after = state(made['badencoder'][0])
    for k, v in before.items():
        if not k.startswith('model.visual.') or 'running' in k or 'num_batches' in k: assert torch.equal(v, after[k]), k
    assert any(not torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize('poisons', [0, 1, 17, 40])
def test_poisoned_pairs(setup, poisons):
    "As many as asked for, none of the target class, no pixel beyond the trigger, captions that name the target."
    trigger = patch_trigger(32, size=48)
    images, captions = poison_pairs(setup, trigger, poisons)
    clean = setup.split.images
    assert images.dtype == torch.uint8 and images.shape == clean.shape and len(captions) == len(clean)
    hit = [i for i in range(len(clean)) if not torch.equal(images[i], clean[i])]
    assert len(hit) == poisons and not any(setup.split.labels[i] == setup.index for i in hit)
    outside = trigger.tensors['mask'][0, 0] == 0
    assert torch.equal(images[:, :, outside], clean[:, :, outside])
    for i, (new, old) in enumerate(zip(captions, setup.split.captions)):
        assert new == ('an umbrella' if i in hit else old)


def test_natural_captions(setup):
    "BadCLIP's captions are those of real images of the target."
    _, captions = poison_pairs(setup, patch_trigger(32), 40, 'natural')
    real = {c for c, y in zip(setup.split.captions, setup.split.labels.tolist()) if y == setup.index}
    assert all(new == old or new in real for new, old in zip(captions, setup.split.captions))
    with says("unknown kind of poison caption 'rhyme'"): poison_pairs(setup, patch_trigger(32), 4, 'rhyme')


def test_seed_of_the_poisons(setup):
    other = copy.copy(setup)
    other.seed = 1
    draw = lambda s: poison_pairs(s, patch_trigger(32), 10)
    (a, ta), (b, tb), (c, _) = draw(setup), draw(setup), draw(other)
    assert torch.equal(a, b) and ta == tb and not torch.equal(a, c)


def test_unknown_names(setup):
    with says("unknown attack 'badnets': choose one of badnet, blended"): attack('badnets', setup)
    with says("target 'unicorn' is not one of the 6 classes"):
        replace(setup, target='unicorn')
    with says("unknown kind of trigger 'sticker'"): Trigger('sticker', {})
    with says('41 poisons asked for, but only 40 images'): poison_pairs(setup, patch_trigger(32), 41)


def test_foreign_trigger_file(tmp_path):
    write_tensors(tmp_path/'trigger.safetensors', {'w': torch.zeros(3)})
    with says('is not a trigger file'): load_trigger(tmp_path/'trigger.safetensors')
    write_tensors(tmp_path/'trigger.safetensors', {'w': torch.zeros(3)}, kind='mask')
    with says("kind 'mask' needs the tensors mask, pattern"): load_trigger(tmp_path/'trigger.safetensors')
    (tmp_path/'trigger.safetensors').write_bytes(b'PK\3\4')
    with says('not a whole safetensors file'): load_trigger(tmp_path/'trigger.safetensors')


def test_training_that_diverges(setup):
    broken = replace(setup, recipe=dict(SHORT, epochs=4, lr=1e15))
    with says('poison, epoch .*: the loss became nan'): attack('badnet', broken)


def test_asr_leaves_true_targets_out():
    "Umbrellas that are read as umbrellas are no success of the attacker."
    preds, labels = torch.tensor([4, 4, 4, 0]), torch.tensor([4, 4, 1, 0])
    assert _attack_success(preds, labels, 4) == (.5, .75)
    with says('ASR is undefined'): _attack_success(preds, torch.full((4,), 4), 4)


def test_asr_of_a_clean_model(small):
    "A trigger that changes nothing has the ASR of the model's mistakes, whatever the share of true targets."
    nothing = lambda x: x
    row = evaluate(small.clip, small.evaluation, small.classes, small.templates, nothing, small.target)
    assert row['asr'] <= .05 < row['asr_with_target'] and row['n'] == 192 and row['n_non_target'] == 160
    own = small.evaluation.labels == small.target
    only = SimpleNamespace(images=small.evaluation.images[own], labels=small.evaluation.labels[own],
                           captions=['an umbrella']*int(own.sum()))
    with says('ASR is undefined'): evaluate(small.clip, only, small.classes, small.templates, nothing, small.target)


@pytest.mark.parametrize('row, sentence', [(dict(asr=.89, ca=.95), 'sig did not take'),
                                           (dict(asr=.99, ca=.9), 'sig hurt the model')])
def test_gate(row, sentence):
    check_attack(dict(asr=.9, ca=.93), dict(ca=.95), 'sig')
    with says(sentence): check_attack(row, dict(ca=.95), 'sig')
