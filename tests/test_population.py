"Drawn triggers: seeded, different, within range at any side, saved and read back; what each kind is said to do."
import pytest
import torch

import invertune.lab.population as population
from invertune.attacks import Setup, demo_split
from invertune.lab.population import POPULATION, draw_trigger, _register_kind
from invertune.lab.profiles import load_params
from invertune.model import pixels
from invertune.runtime import InvertuneError
from invertune.triggers import load_trigger

LEARNED = [name for name in POPULATION if population._is_learned(name)]
DRAWN = [name for name in POPULATION if name not in LEARNED]


def pictures(side, n=3): return pixels(demo_split(6*n, 10**8, side).images[::6])


@pytest.fixture(scope='module')
def setup(small): return Setup(small.clip, demo_split(96, 5*10**6), small.classes, small.templates, 'umbrella')


def changed(trigger, x):
    "The image with the trigger, having checked that it is an image and that what came in is as it was."
    before, y = x.clone(), trigger(x)
    assert torch.equal(x, before) and y.shape == x.shape and 0 <= y.min() and y.max() <= 1
    assert (y - x).abs().flatten(1).amax(1).min() > 1/255
    return y


@pytest.mark.parametrize('side', [32, 64, 96])
@pytest.mark.parametrize('name', DRAWN)
def test_drawn(name, side, tmp_path):
    "Any side and strength; the same seed gives the same trigger, another seed another one; a file holds all of it."
    x = pictures(side)
    draws = (0, .5), (0, .5), (1, .5), (0, .1), (2, 1.)
    made = [changed(draw_trigger(name, seed, side, strength), x) for seed, strength in draws]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    trigger = draw_trigger(name, 0, side, .5)
    trigger.save(tmp_path/'trigger.safetensors')
    again = load_trigger(tmp_path/'trigger.safetensors')
    assert torch.equal(again(x), made[0]) and again.meta == dict(population=name, draw=0, strength=.5)


@pytest.mark.parametrize('name', LEARNED)
def test_learned(name, setup, tmp_path, monkeypatch):
    "The same from the attacker's images and model, which are left as they were; a few steps of the training do here."
    learn = population._learn
    monkeypatch.setattr(population, '_learn', lambda *args: learn(*args, steps=3, bs=8))
    state, weights, x = torch.get_rng_state(), [p.clone() for p in setup.clip.parameters()], pictures(32)
    made = [changed(draw_trigger(name, seed, 32, .8, setup), x) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, w) for p, w in zip(setup.clip.parameters(), weights))
    draw_trigger(name, 0, 32, .8, setup).save(tmp_path/'trigger.safetensors')
    assert torch.equal(load_trigger(tmp_path/'trigger.safetensors')(x), made[0])


def test_strength_is_nothing_but_strength():
    "Weaker: nearer to the image, on the mean over seeds, for every kind."
    x = pictures(64)
    far = lambda name, strength: sum((draw_trigger(name, s, 64, strength)(x) - x).abs().mean() for s in range(6))
    assert [name for name in DRAWN if far(name, .1) >= far(name, 1.)] == []


def test_the_split_has_every_kind_once_and_every_group_on_both_sides():
    sides = list(load_params()['plant']['kinds'].values())
    assert sorted([*sides[0], *sides[1]]) == sorted(POPULATION) and len(POPULATION) >= 24
    for side in sides: assert {POPULATION[kind].group for kind in side} == set(population._GROUPS)
    assert abs(len(sides[0]) - len(sides[1])) <= 4


def test_patches_have_the_sizes_and_places_that_they_are_drawn_with():
    "12 to 64 pixels at 224, all over the image."
    boxes = []
    for seed in range(40):
        at = (draw_trigger('patch-noise', seed, 224, (seed + 1)/40).tensors['mask'][0, 0] > 0).nonzero()
        low, high = at.amin(0), at.amax(0)
        boxes.append([*(high - low + 1).tolist(), *((low + high)/2).tolist()])
    tall, wide, y, x = map(list, zip(*boxes))
    assert 11 <= min(tall + wide) and max(tall + wide) <= 64 and max(tall) > 40 and min(tall) < 20
    assert min(x + y) < 60 and max(x + y) > 164


def test_what_kinds_do_is_what_they_are_called():
    x = pictures(64)
    grey = draw_trigger('grey', 0, 64)(x)
    assert (grey - grey.mean(1, keepdim=True)).abs().max() < 1e-5
    assert len(draw_trigger('posterise', 0, 64)(x)[:, 0].unique()) <= 3
    cells = draw_trigger('mosaic', 0, 64)
    cell, top, left = cells.tensors['cells'][0].tolist()
    inside = cells(x)[:, :, cell-top:2*cell-top, cell-left:2*cell-left]
    assert torch.allclose(inside, inside[:, :, :1, :1].expand_as(inside), atol=1e-6)
    turned = draw_trigger('channels', 0, 64).tensors['matrix'][0, :, :3]
    hit = turned > 0
    assert hit.sum() == 3 and hit.any(0).all() and hit.any(1).all() and not hit.diag().all()


def test_two_marks_lie_apart():
    for seed in range(10):
        t = draw_trigger('two-marks', seed, 64).tensors
        assert t['first'].any() and t['second'].any() and not (t['first'] * t['second']).any()


def test_the_placed_patch_lies_where_the_model_looks(setup):
    "More of the attribution is under it than under most others of its size."
    import torch.nn.functional as F
    seen = population._attribution(setup)
    mask = draw_trigger('attribution', 0, 32, .5, setup).tensors['mask'][0, 0] > 0
    s = max(mask.any(0).sum().item(), mask.any(1).sum().item())
    top, left = mask.nonzero().amin(0).tolist()
    sums = F.avg_pool2d(seen[None, None], s, 1)[0, 0]
    place = sums[min(top, sums.shape[0] - 1), min(left, sums.shape[1] - 1)]
    assert (sums < place).float().mean() > .6


def test_compression_lets_the_gradient_through():
    x = pictures(32).requires_grad_()
    draw_trigger('jpeg', 0, 32)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize('call, words', [
    (lambda: draw_trigger('waves', 0, 32), "unknown kind 'waves'"),
    (lambda: draw_trigger('wave', 0, 32, 2.), r'lies in \(0, 1\]'),
    (lambda: draw_trigger('attention', 0, 32), 'give a setup'), (lambda: _register_kind('mine', 'colours'), 'group'),
    (lambda: _register_kind('wave', 'pattern')(lambda gen, side, strength: None), 'is there already')])
def test_what_can_not_be_drawn_is_refused(call, words):
    with pytest.raises(InvertuneError, match=words): call()


def test_a_kind_of_a_reviewer(monkeypatch):
    "One function under a decorator is all."
    monkeypatch.setattr(population, 'POPULATION', dict(POPULATION))
    @_register_kind('mine', 'pattern')
    def mine(gen, side, strength): return POPULATION['wave'](gen, side, strength)
    assert (mine.group, mine.poison) == ('pattern', 'target')
    assert draw_trigger('mine', 0, 32).meta['population'] == 'mine'
