"Triggers that the defenses were not made for, and what goes more than one round."
from functools import partial

import pytest
import torch

import invertune.lab.unseen as unseen_module
from invertune.attacks import ATTACKS, Setup, attack, demo_split
from invertune.lab.victim import Victim
from invertune.lab.unseen import plant_victim, unseen
from invertune.model import pixels
from invertune.runtime import InvertuneError
from invertune.triggers import blended_stripes_trigger, load_trigger, patch_trigger, text_trigger, triangles_trigger

SHORT = dict(poisons=8, epochs=1, lr=1e-4, bs=16)
NAMES = ['stripes', 'stripes-anywhere', 'badnet-anywhere', 'blended-stripes', 'triangles', 'text', 'sig-rows', 'two',
         'vit']
DRAWN = {'stripes': partial(patch_trigger, pattern='stripes'), 'anywhere': partial(patch_trigger, place='anywhere'),
         'blended-stripes': blended_stripes_trigger, 'triangles': triangles_trigger, 'text': lambda side,
         seed=0: text_trigger(side)}


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
    "One whole patch an image, each at a place of its own; the images that came in are as they were."
    trigger, x = patch_trigger(64, size=28, place='anywhere'), images(64, 64)
    before = x.clone()
    hit = (trigger(x) != x).any(1)
    places = [tuple(h.nonzero()[0].tolist()) for h in hit]
    assert torch.equal(x, before) and (hit.sum((1, 2)) == 64).all()
    assert len(set(places)) > 50 and max(max(p) for p in places) <= 56
    for y, (top, left) in zip(trigger(x), places): assert torch.equal(y[:, top:top+8, left:left+8],
        trigger.tensors['patch'][0])
    assert torch.equal(trigger(x), trigger(x)) and torch.equal(trigger(x)[:5],
        trigger(x[:5]))   # whatever batch an image is in


def test_pictures():
    "Stripes are upright, triangles have two colors a cell, weights bound the change, a word lies within its image."
    stripes = patch_trigger(64, size=28, pattern='stripes').tensors
    inside = stripes['pattern'][0, :, -8:, -8:]
    assert stripes['mask'].sum() == 64 and torch.equal(inside,
                                                       inside[:, :1].expand_as(inside)) and len(inside[0,
                                                           0].unique()) == 8
    mosaic = triangles_trigger(64, cell=28).tensors['pattern'][0]
    assert all(len(c.flatten(1).unique(dim=1).T) == 2 for row in mosaic.split(8, 1) for c in row.split(8, 2))
    x = images(2, 64)
    assert (blended_stripes_trigger(64, alpha=.1)(x) - x).abs().max() <= .1 + 1e-6
    for side in (32, 64, 224):
        ink = text_trigger(side, alpha=1.).tensors['mask'][0, 0]
        assert ink.sum() > side/2 and not ink[:side//3].any() and not ink[-side//3:].any() and not ink[:,
            0].any() and not ink[:, -1].any()


@pytest.fixture(scope='module')
def setup(small):
    "Few pairs, and the clean model that the demonstration started from."
    return Setup(small.clip, demo_split(48, 5*10**6), small.classes, small.templates, 'umbrella')


def test_one_registry_holds_them_all():
    assert set(NAMES) < set(ATTACKS) and list(ATTACKS)[:6] == ['badnet', 'blended', 'sig', 'wanet', 'badencoder',
        'badclip']


@pytest.mark.parametrize('name', NAMES)
def test_planted(setup, name):
    "A model that differs, triggers that say whose they are; the clean model and the pairs are as they were."
    setup.recipe = dict(SHORT, second='anchor') if name == 'two' else SHORT
    weights, before = {k: v.clone() for k, v in setup.clip.state_dict().items()}, setup.split.images.clone()
    clip, triggers = attack(name, setup)
    assert [t.meta for t in triggers] == [dict(target=t, attack=name, seed=0)
                                          for t in (['umbrella', 'anchor'] if name == 'two' else ['umbrella'])]
    assert all(torch.equal(v, setup.clip.state_dict()[k]) for k,
               v in weights.items()) and torch.equal(setup.split.images, before)
    assert not clip.training and any(not torch.equal(v, weights[k]) for k, v in clip.state_dict().items())


def test_rows_are_columns_turned(setup):
    setup.recipe = SHORT
    (upright,), (turned,) = attack('sig', setup)[1], attack('sig-rows', setup)[1]
    assert torch.equal(turned.tensors['delta'],
                       upright.tensors['delta'].mT) and not torch.equal(turned.tensors['delta'],
                           upright.tensors['delta'])


def test_a_second_backdoor_needs_a_target_of_its_own(setup):
    setup.recipe = dict(SHORT, second='umbrella')
    with pytest.raises(InvertuneError, match="both are 'umbrella'"): attack('two', setup)


def test_two_poison_apart(setup, monkeypatch):
    "Each trigger has poisons and captions of its own, and no image carries both."
    seen = {}
    monkeypatch.setattr(unseen_module, 'train_clip', lambda clip, images, captions,
                        **kw: seen.update(images=images, captions=captions))
    setup.recipe = dict(SHORT, second='anchor')
    attack('two', setup)
    halves = unseen_module._random_halves(setup.split, setup.seed)
    assert sorted(c for h in halves for c in h.captions) == sorted(setup.split.captions)
    changed = (seen['images'] != torch.cat([h.images for h in halves])).flatten(1).any(1)
    assert [seen['captions'][i] for i in changed.nonzero().flatten().tolist()] == ['an umbrella']*8 + ['an anchor']*8


def test_a_vit_victim_keeps_the_text_tower(setup):
    "The text tower is the clean model's and can be trained again afterwards; the image tower is new."
    vit = unseen_module._vit_victim(setup.clip, setup.split, width=4, epochs=1, lr=1e-4, bs=16)
    own, theirs = vit.model.state_dict(), setup.clip.model.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in theirs if not k.startswith('visual.')) and all(p.requires_grad
        for p in vit.parameters())
    assert vit.encode_image(pixels(setup.split.images[:2])).shape == setup.clip.encode_image(pixels(setup.split.images[:2])).shape


def test_an_attack_that_does_not_take_is_refused(setup, small):
    from invertune.data import Dataset
    dataset = Dataset(small.classes, small.templates, dict(evaluation=small.evaluation).__getitem__)
    setup.recipe = SHORT
    with pytest.raises(InvertuneError, match='stripes did not take'): plant_victim('stripes', setup, dataset,
        max_drop=1.)


@pytest.mark.parametrize('failed, names',
                         [([None, None], ['invertune', 'invertune-2']),
                          ([None, 'It failed.'], ['invertune', 'invertune-2']), (['It failed.'], ['invertune'])])
def test_rounds_go_on_until_an_inversion_fails(monkeypatch, failed, names):
    "Each round gets what the last one has left."
    seen, told = [], iter(failed)
    def defend(name, clip, defender, seed, **params):
        seen.append(clip)
        return clip + 1, dict(failed=next(told))
    monkeypatch.setattr(unseen_module, 'defend', defend)
    monkeypatch.setattr(Victim, 'defender', None)
    victim = Victim(None, 0, 'two', None, 0, [])
    monkeypatch.setattr(Victim, 'rows', lambda self, clip, name, report: [(name, clip)])
    assert unseen.measure(victim, {'invertune': {}}, {'invertune': 2}) == [(name, k+1) for k,
        name in enumerate(names)] and seen == list(range(len(names)))


def test_later_rounds_stand_in_for_the_first_in_the_figure():
    "Attacks in the order of the registry, both targets of one attack, percent, and no number where none was measured."
    rates = dict(asr=.97, robust=.02, robust_clean=.9, asr_any=.97, ca=.9, ca_clean=.92)
    row = dict(attack='two', trigger=1, target='anchor', defense='none', seed=0, found=None, inverted_asr=None,
               failed=None) | rates
    rows = [row, row | dict(trigger=0, target='umbrella'), row
            | dict(attack='text', trigger=0, defense='invertune', inverted_asr=.5),
            row | dict(attack='text', trigger=0),
            row | dict(attack='text', trigger=0, defense='invertune-2', asr=.1)]
    table = unseen_module._rows_table(rows)
    assert list(table['attack']) == ['text']*3 + ['two']*2 and list(table['target'])[3:] == ['umbrella', 'anchor']
    assert list(table['defense'])[:3] == ['none', 'invertune',
                                          'invertune-2'] and table['inverted_asr'].isna().sum() == 4 and table['inverted_asr'][1] == 50
    last = {(r['attack'], r['trigger'], r['defense']): r['asr'] for r in unseen_module._last_rounds(rows)}
    assert last['text', 0, 'invertune'] == .1 and len(last) == 4
