"Triggers that the defenses were not made for, and what goes more than one round."
from functools import partial

import pytest
import torch

import invertune.lab.unseen as harder
from invertune.attacks import ATTACKS, Setup, demo_split
from invertune.lab.unseen import HARDER, harder_table, plant, rounds, split_halves, vit_victim
from invertune.model import pixels
from invertune.runtime import InvertuneError
from invertune.triggers import (blended_stripes_trigger, load_trigger, patch_trigger, text_trigger, triangles_trigger, word_mask)

SHORT = dict(poisons=8, epochs=1, lr=1e-4, bs=16)
DRAWN = {'stripes': partial(patch_trigger, pattern='stripes'), 'anywhere': partial(patch_trigger, place='anywhere'),
         'blended-stripes': blended_stripes_trigger, 'triangles': triangles_trigger, 'text': lambda side, seed=0: text_trigger(side)}


def images(n, side): return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize('side', [32, 64, 100, 224])
@pytest.mark.parametrize('name', DRAWN)
def test_drawn(name, side, tmp_path):
    "Any side: pixels stay pixels, the same seed gives the same trigger, and the file holds all of it."
    x, trigger = images(3, side), DRAWN[name](side)
    y = trigger(x)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and (y != x).flatten(1).any(1).all()
    assert torch.equal(y, DRAWN[name](side, seed=0)(x))
    assert name == 'text' or not torch.equal(y, DRAWN[name](side, seed=1)(x))
    trigger.save(tmp_path/'trigger.safetensors')
    assert torch.equal(load_trigger(tmp_path/'trigger.safetensors')(x), y)


def test_anywhere():
    "One whole patch an image, at places that the batch decides; the images that came in are as they were."
    trigger, x = patch_trigger(64, size=28, place='anywhere'), images(64, 64)
    before = x.clone()
    hit = (trigger(x) != x).any(1)
    places = [tuple(h.nonzero()[0].tolist()) for h in hit]
    assert torch.equal(x, before) and (hit.sum((1, 2)) == 64).all()
    assert len(set(places)) > 50 and max(max(p) for p in places) <= 56
    for y, (top, left) in zip(trigger(x), places): assert torch.equal(y[:, top:top+8, left:left+8], trigger.tensors['patch'][0])
    assert torch.equal(trigger(x), trigger(x))
    other = (trigger(x.flip(3)*.5) != x.flip(3)*.5).any(1)
    assert places != [tuple(h.nonzero()[0].tolist()) for h in other]


def test_pictures():
    "Stripes are upright, triangles have two colors a cell, weights bound the change, a word lies within its image."
    stripes = patch_trigger(64, size=28, pattern='stripes').tensors
    inside = stripes['pattern'][0, :, -8:, -8:]
    assert stripes['mask'].sum() == 64 and torch.equal(inside, inside[:, :1].expand_as(inside)) and len(inside[0, 0].unique()) == 8
    mosaic = triangles_trigger(64, cell=28).tensors['pattern'][0]
    assert all(len(c.flatten(1).unique(dim=1).T) == 2 for row in mosaic.split(8, 1) for c in row.split(8, 2))
    x = images(2, 64)
    assert (blended_stripes_trigger(64, alpha=.1)(x) - x).abs().max() <= .1 + 1e-6
    for side in (32, 64, 224):
        ink = word_mask('Watermarked', side)
        assert ink.sum() > side/2 and not ink[:side//3].any() and not ink[-side//3:].any() and not ink[:, 0].any() and not ink[:, -1].any()
    with pytest.raises(InvertuneError, match="unknown place of a patch 'rim'"): patch_trigger(64, place='rim')
    with pytest.raises(InvertuneError, match="unknown pattern of a patch 'dots'"): patch_trigger(64, pattern='dots')
    with pytest.raises(InvertuneError, match='a patch of fresh noise needs one place'): patch_trigger(64, place='anywhere', pattern='noise')


@pytest.fixture(scope='module')
def setup(small):
    "Few pairs, and the clean model that the demonstration started from"
    return Setup(small.clip, demo_split(48, 5*10**6), small.classes, small.templates, 'umbrella')


@pytest.mark.parametrize('name', HARDER)
def test_plant(setup, name):
    "A model that differs, triggers that say whose they are; the clean model and the pairs are as they were."
    setup.recipe = dict(SHORT, second='anchor') if name == 'two' else SHORT
    weights, before = {k: v.clone() for k, v in setup.clip.state_dict().items()}, setup.split.images.clone()
    clip, triggers = plant(name, setup)
    assert [t.meta for t in triggers] == [dict(target=t, attack=name, seed=0) for t in (['umbrella', 'anchor'] if name == 'two' else ['umbrella'])]
    assert all(torch.equal(v, setup.clip.state_dict()[k]) for k, v in weights.items()) and torch.equal(setup.split.images, before)
    assert not clip.training and any(not torch.equal(v, weights[k]) for k, v in clip.state_dict().items())


def test_names(setup):
    "The main table keeps its six attacks, and a second backdoor needs a target of its own."
    assert list(ATTACKS) == ['badnet', 'blended', 'sig', 'wanet', 'badencoder', 'badclip'] and not set(ATTACKS) & set(HARDER)
    with pytest.raises(InvertuneError, match="unknown attack 'stripe': choose one of stripes"): plant('stripe', setup)
    setup.recipe = dict(SHORT, second='umbrella')
    with pytest.raises(InvertuneError, match="both are 'umbrella'"): plant('two', setup)


def test_two_poison_apart(setup, monkeypatch):
    "Each trigger has poisons and captions of its own, and no image carries both."
    seen = {}
    monkeypatch.setattr(harder, 'train_clip', lambda clip, images, captions, **kw: seen.update(images=images, captions=captions))
    setup.recipe = dict(SHORT, second='anchor')
    plant('two', setup)
    halves = split_halves(setup.split, setup.seed)
    assert sorted(c for h in halves for c in h.captions) == sorted(setup.split.captions)
    clean = torch.cat([h.images for h in halves])
    changed = (seen['images'] != clean).flatten(1).any(1)
    said = [seen['captions'][i] for i in changed.nonzero().flatten().tolist()]
    assert said == ['an umbrella']*8 + ['an anchor']*8


def test_vit_victim(setup):
    "The text tower is the clean model's and can be trained again afterwards; the image tower is new."
    vit = vit_victim(setup.clip, setup.split, width=4, epochs=1, lr=1e-4, bs=16)
    own, theirs = vit.model.state_dict(), setup.clip.model.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in theirs if not k.startswith('visual.'))
    assert all(p.requires_grad for p in vit.parameters())
    assert vit.encode_image(pixels(setup.split.images[:2])).shape == setup.clip.encode_image(pixels(setup.split.images[:2])).shape


@pytest.mark.parametrize('asr, kept, last', [([.9, .8, .9], [True, True, True], 3), ([.9, .2, .9], [True, False], 1), ([.2, .1], [True, False], 1)])
def test_rounds(monkeypatch, asr, kept, last):
    "The first round always counts; a later one only when its inversion passes the gate, and one that fails is the last."
    monkeypatch.setattr(harder, 'defend', lambda name, clip, clean, seed, **kw: (clip + 1, dict(inverted_asr=asr[clip])))
    done = list(rounds(0, None, n=3))
    assert [report['kept'] for _, report in done] == kept and done[-1][0] == last


def test_table():
    "Attacks in the order of the registry, both targets of one attack, percent, and no number where none was measured."
    row = dict(attack='two', trigger=1, target='anchor', defense='none', found=None, inverted_asr=None, asr=.97, ca=.9)
    table = harder_table([row, dict(row, trigger=0, target='umbrella'), dict(row, attack='text', trigger=0, defense='invertune', inverted_asr=.5), dict(row, attack='text', trigger=0)])
    assert list(table['attack']) == ['text', 'text', 'two', 'two'] and list(table['target'])[2:] == ['umbrella', 'anchor']
    assert list(table['defense'])[:2] == ['none', 'invertune'] and table['inverted_asr'].isna().sum() == 3 and table['inverted_asr'][1] == 50
