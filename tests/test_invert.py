"Step 2: the published inversion keeps a small mask, a failure is said, and nothing is chosen on what is reported on."
import json

import pytest
import torch

from invertune import invert as step2
from invertune.attacks import demo, demo_split
from invertune.defender import Case
from invertune.invert import Bank, inverted_asr, invert, invert_paper, load_bank
from invertune.runtime import InvertuneError
from invertune.search import FAMILIES, diluted, random_perturbation
from invertune.triggers import Trigger

SHORT = dict(steps=2, draws=4, stride=56, families=('flow',))


@pytest.fixture(scope='module')
def case(small): return Case(small.bad, small.defender)


@pytest.fixture(scope='module')
def paper(case): return invert_paper(case, 4, seed=1)


# The published inversion

def test_micro_batches_invert_as_the_whole_does(case, monkeypatch):
    whole = invert_paper(case, 4, steps=5)
    monkeypatch.setattr(step2, 'images_at_once', lambda clip: 10)
    parts = invert_paper(case, 4, steps=5)
    for k, v in whole[0].tensors.items(): assert torch.allclose(v, parts[0].tensors[k], atol=1e-3)
    assert whole.report['curve'][-1]['loss'] == pytest.approx(parts.report['curve'][-1]['loss'], rel=1e-3)


def test_the_kept_mask_is_small(paper):
    "About the published share of the image, 1 %; never more than 5 %. At the first looks it hides a third."
    assert paper.share() <= .05 and paper.mask().sum() == pytest.approx(paper.share() * 32*32)
    tempting = max(paper.report['curve'], key=lambda look: look['asr'])
    assert tempting['share'] > .3  # a mask that large sends everything anywhere: by inverted ASR alone it would be kept
    assert paper.report['step'] > 80 and paper.report['triggers'][0]['mask_share'] == paper.share()
    assert paper.passed and paper.inverted_asr > .8


def test_the_kept_mask_of_a_trigger_that_is_everywhere_is_small():
    d = demo('blended', cell=4, poisons=128, epochs=12, lr=.008, bs=32)
    bank = invert_paper(Case(d.bad, d.defender), d.target)
    assert bank.share() <= .05 and max(bank.report['curve'], key=lambda look: look['asr'])['share'] > .3


def looks(*rows): return [(random_perturbation('patch', 32, i), dict(step=i, loss=0., asr=a, share=s))
                          for i, (a, s) in enumerate(rows, 1)]


def kept(case, rows, budget=.02, limit=.05): return step2._kept(case, 4, looks(*rows), budget, limit, .7)


@pytest.mark.parametrize('rows, step', [
    ([(1., .4), (.8, .1), (.9, .02), (.7, .01)], 3),  # the best of those that are small, however good a large one is
    ([(1., .4), (.9, .02), (.9, .01)], 3),            # the later of equals
    ([(1., .4), (1., .2), (.8, .1)], 3)])             # none is small: the last one
def test_the_state_that_is_kept(case, rows, step):
    bank = kept(case, rows)
    assert bank.report['step'] == step and len(bank) == 1 and len(bank.report['curve']) == len(rows)
    assert torch.equal(bank[0].tensors['coarse'], looks(*rows)[step-1][0].tensors['coarse'])


def test_a_mask_that_has_not_shrunk_is_a_failure(case):
    "However high the inverted ASR: one step from a random mask hides half of the image."
    bank = invert_paper(case, 4, steps=1)
    assert bank.share() > .4 and not bank.passed
    bank.asr = [1.]
    assert 'its mask covers' in bank.failed and 'more than 5%' in bank.failed


def test_the_start_is_random(case):
    "Not ones: the first mask has a mean of a half, and another seed draws another."
    one, two = (invert_paper(case, 4, steps=1, seed=s) for s in (0, 1))
    assert .45 < one.mask().mean() < .55 and one.mask().min() < .1 and not torch.equal(one.mask(), two.mask())


# A bank and its gate

def bank_of(*asr, gate=.7): return Bank([random_perturbation('patch', 32, i) for i in range(len(asr))], list(asr), gate)


def test_a_failure_is_said():
    assert bank_of(.9, .1).failed is None and bank_of(.9).passed and bank_of(.7).passed
    low, none = bank_of(.69), bank_of()
    assert low.failed == 'the inversion has failed: its inverted ASR is 69.0%, under the gate of 70%'
    assert none.failed == 'the inversion has failed: it made no trigger' and none.inverted_asr == 0
    assert bank_of(.69, gate=.6).passed and 'failed' in repr(low)


def test_above_a_gate_means_above_it():
    bank = bank_of(.9, .6, .8)
    assert bank.above(.7).asr == [.9, .8] and [t is u for t, u in zip(bank.above(.7).triggers, bank.triggers[::2])]
    assert len(bank.above(.95)) == 0 and not bank.above(.95).passed
    bank.early = 2
    assert bank.above(.7).early == 1 and bank.above(.5).early == 2


@pytest.mark.parametrize('family', FAMILIES)
def test_masks(family):
    bank = Bank([random_perturbation(family, 32)], [1.])
    assert bank.mask().shape == (32, 32) and 0 <= bank.mask().min() and bank.mask().max() <= 1
    assert 0 < bank.share() <= 1 and bank._repr_png_()[:4] == b'\x89PNG'


def test_bank_files(tmp_path):
    bank = Bank([random_perturbation('patch', 32), random_perturbation('flow', 32)], [1., .25], .6, .05, dict(note='x'), 1)
    file = tmp_path/'bank.safetensors'
    bank.save(file)
    x, again = torch.rand(2, 3, 32, 32), load_bank(file)
    assert again.asr == [1., .25] and again.families == ['patch', 'flow'] and (again.gate, again.limit, again.early) == (.6, .05, 1)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(again.triggers, bank.triggers))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InvertuneError, match='not a whole safetensors file'): load_bank(file)
    random_perturbation('patch', 32).save(file)
    with pytest.raises(InvertuneError, match='is not a bank of inverted triggers'): load_bank(file)


def test_an_empty_bank_has_a_file(tmp_path):
    Bank([], []).save(tmp_path/'bank.safetensors')
    again = load_bank(tmp_path/'bank.safetensors')
    assert len(again) == 0 and again.asr == [] and not again.passed and again._repr_png_()[:4] == b'\x89PNG'


def test_the_inverted_asr_leaves_out_what_is_there_already(case):
    "A trigger that sends everything to the target has 1, one that changes nothing 0, whatever the model reads anyway."
    images, _, reads = case.part('test')
    assert (reads == 4).any()
    still = Trigger('add', dict(delta=torch.zeros(1, 3, 32, 32)))
    assert inverted_asr(case, 4, still) == 0
    hit = images[reads == 4][:1] / 255
    same = Trigger('mask', dict(mask=torch.ones(1, 1, 32, 32), pattern=hit))
    assert inverted_asr(case, 4, same) == 1 and inverted_asr(case, 4, same, 'select') == 1


# Ours

def test_the_inversion_finds_a_small_patch(small, case):
    bank = invert(case, small.target, steps=12)
    assert bank.passed and bank.inverted_asr > .9 and 'place' in bank.families
    told = json.loads(json.dumps(bank.report))
    assert told['target'] == 'umbrella' and told['failed'] is None and told['tried'] == 2 + 2*len(FAMILIES)
    assert 0 <= told['early'] <= len(bank) <= told['tried'] and len(told['triggers']) == len(bank) and len(told['places']) == 100
    for t, f in zip(told['triggers'], bank.families): assert (t['place'] is None) == (f != 'place')


def test_the_same_seed_makes_the_same_bank(case):
    one, two, other = (invert(case, 4, **SHORT, seed=s) for s in (0, 0, 1))
    same = lambda a, b: all(torch.equal(v, u.tensors[k]) for t, u in zip(a.triggers, b.triggers)
                            for k, v in t.tensors.items())
    assert one.asr == two.asr and same(one, two) and not same(one, other)


@pytest.mark.parametrize('run', [lambda c: invert(c, 4, **SHORT), lambda c: invert_paper(c, 4, steps=20)])
def test_nothing_is_chosen_on_the_images_that_are_reported_on(small, case, run):
    "Other pictures in the part `test` may change the inverted ASR, but no trigger and not their order."
    other = Case(small.bad, small.defender)
    other.images = case.images.clone()
    other.images[-len(case.test):] = demo_split(len(case.test), 5*10**6).images.flip(-1)
    one, two = run(case), run(other)
    assert one.families == two.families
    for t, u in zip(one.triggers, two.triggers):
        assert all(torch.equal(v, u.tensors[k]) for k, v in t.tensors.items())


def test_what_is_promising():
    "Those that reach a fifth; where none does the best one goes on."
    assert step2._promising([0, 1, 2], [.1, .2, .9]) == [1, 2]
    assert step2._promising([0, 1, 2], [.1, .15, 0.]) == [1]
    assert step2._promising([], []) == []


def test_what_arrives_early_comes_first(case):
    "The first triggers of a bank reach its gate at half of their strength as well; with strength 1 none is tried there."
    few = SHORT | dict(families=('field', 'flow'), steps=12, trial=4)
    bank, late = (invert(case, 4, **few, strength=s) for s in (.5, 1.))
    early = bank.triggers[:bank.report['early']]
    assert early and all(inverted_asr(case, 4, diluted(t), 'select') >= bank.gate for t in early)
    assert {t.meta['family'] for t in early}.isdisjoint(t.meta['family'] for t in bank.triggers[len(early):])
    assert not late.report['early'] and late.report['tried'] == bank.report['tried']


def test_a_class_that_nothing_leads_to_fails(small):
    "On the clean model the published inversion comes to no trigger, and says so."
    bank = invert_paper(Case(small.clip, small.defender), small.target)
    assert not bank.passed and bank.report['failed'] == bank.failed


def test_neighbours():
    assert step2._neighbours([(0, 0)], 4, 24) == [(0, 0), (0, 4), (4, 0), (4, 4)]
    assert len(step2._neighbours([(8, 8), (8, 12)], 4, 24)) == 12
