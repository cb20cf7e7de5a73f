"Step 1: what decides between candidates, and that nothing is chosen on the images that are reported on."
import json

import pytest
import torch

from invertune import identify as step1
from invertune.attacks import demo_split
from invertune.defender import Case
from invertune.identify import identify, identify_paper, shortcut, _simulate
from invertune.runtime import InvertuneError
from invertune.search import FAMILIES, random_perturbation
from invertune.verdict import judge


@pytest.fixture(scope='module')
def case(small): return Case(small.bad, small.defender)


QUICK = dict(draws=4, steps=2, stride=56)


def one(case, **kw): return identify(case, families=['patch'], named=len(case.classes), **QUICK, **kw)


def test_both_rules_name_the_target(small, case):
    ours, paper = identify(case), identify_paper(case, steps=15)
    assert ours.target == paper.target == small.target and ours.name == paper.name == 'umbrella'
    assert ours.probability.sum() == pytest.approx(1) and ours.probability.argmax() == small.target
    assert [s['family'] for s in ours.simulations] == [*FAMILIES, 'place'] and len(paper.simulations) == 1
    assert len({c['index'] for c in ours.candidates}) == len(ours.candidates) == 6 and paper.candidates == []


def test_shares_are_shares_of_images(case):
    found = _simulate(case, random_perturbation('flow', 32), n=40)
    for key in ('clean_share', 'adv_share'):
        assert found[key].sum() == pytest.approx(1)
        assert all(abs(s*40 - round(s*40)) < 1e-4 for s in found[key].tolist())
    reads = case.part('select', 40)[2]
    assert found['clean_share'].tolist() == pytest.approx([(reads == c).float().mean().item() for c in range(6)])


def test_a_shortcut_leaves_its_start_alone(case):
    start = random_perturbation('patch', 32)
    shortcut(case, 4, start, steps=2)
    assert torch.equal(start.tensors['coarse'], random_perturbation('patch', 32).tensors['coarse'])


def test_the_same_seed_says_the_same(case):
    one, two = (identify(case, families=['place', 'flow'], **QUICK, seed=1).to_dict() for _ in range(2))
    assert one == two


def test_nothing_is_chosen_on_the_images_that_are_reported_on(small, case):
    "Other pictures in the part `test` change nothing at all in what is said."
    other = Case(small.bad, small.defender)
    other.images = case.images.clone()
    other.images[-len(case.test):] = demo_split(len(case.test), 5*10**6).images.flip(-1)
    said = [identify(c, families=['place', 'field'], **QUICK).to_dict() for c in (case, other)]
    assert not torch.equal(case.test, other.test) and said[0] == said[1]
    assert identify_paper(other, steps=3).to_dict() == identify_paper(case, steps=3).to_dict()


def test_a_report_that_json_can_say(case):
    told = json.loads(json.dumps(one(case).to_dict()))
    assert told.keys() == {'target', 'family', 'classes', 'probability', 'simulations', 'candidates'}
    assert told['target'] in told['classes'] and {c['class'] for c in told['candidates']} <= set(told['classes'])
    assert told['candidates'][0].keys() == {'class', 'family', 'gap', 'score', 'ways'}


@pytest.mark.parametrize('rule', [one, lambda case: identify_paper(case, steps=1)])
def test_it_draws_itself(case, rule):
    found = rule(case)
    assert found._repr_png_()[:4] == b'\x89PNG' and found.name in repr(found)


def test_unknown_family(case):
    with pytest.raises(InvertuneError, match="Unknown family of perturbations 'fog'"): identify(case, families=['fog'])


# What decides

def test_a_gap_decides_between_shortcuts_of_one_length(case, monkeypatch):
    monkeypatch.setattr(step1, 'shortcut', lambda *args, **kw: -1.)
    for favoured in (0, 1):
        monkeypatch.setattr(step1, 'text_image_gap', lambda case: torch.eye(6)[favoured] * .07)
        found = one(case)
        assert found.target == favoured and max(c['gap'] for c in found.candidates) == pytest.approx(2)
        assert [c['score'] for c in found.candidates] == pytest.approx([c['gap'] for c in found.candidates])


def test_a_gap_alone_is_no_backdoor(case, monkeypatch):
    "However far a text has been moved: that of a cleaned model's former target keeps its place."
    monkeypatch.setattr(step1, 'shortcut', lambda *args, **kw: -1.)
    monkeypatch.setattr(step1, 'text_image_gap', lambda case: torch.eye(6)[1])
    found = one(case)
    assert found.target == 1 and max(c['score'] for c in found.candidates) == 2 and not judge(found).backdoored


def test_a_gap_within_chance_does_not_decide(case, monkeypatch):
    "A text that fits better than usual takes nothing from the target, nor does one whose gap is no larger than that."
    ways = {0: -.01, 1: -.2}
    monkeypatch.setattr(step1, 'shortcut', lambda case, index, *args, **kw: ways.get(index, -1.))
    monkeypatch.setattr(step1, 'text_image_gap', lambda case: .02 * (torch.eye(6)[1] - torch.eye(6)[0]))
    found = one(case)
    assert found.target == 0 and all(c['gap'] == 0 for c in found.candidates)


def test_what_leads_everywhere_says_nothing(case, monkeypatch):
    "A family that reaches every class as easily names none; one that reaches a single class does."
    ways = dict(field=[-.1]*6, patch=[-5., -5., -5., -1., -5., -5.])
    monkeypatch.setattr(step1, 'shortcut', lambda case, index, t, *args: ways[t.meta['family']][index])
    monkeypatch.setattr(step1, 'text_image_gap', lambda case: torch.zeros(6))
    found = identify(case, families=('field', 'patch'), **QUICK)
    assert found.target == 3 and found.family == 'patch'
    assert {c['index']: c['score'] for c in found.candidates} == {c: pytest.approx(4. if c == 3 else 0.) for c in range(6)}


def test_a_class_stands_out_in_the_spread_of_the_others():
    "Wherever all lie; what is known beforehand is added in quadrature, and one odd class among the others hides nothing."
    ways = torch.tensor([14., 0., 2., 4., 6., 8.])[:, None]           # the others: median 4, MAD 2
    spread = ((1.4826*2)**2 + 1)**.5
    assert step1._deviations(ways, ['patch'])[0].item() == pytest.approx(10/spread)
    assert step1._deviations(ways + 7, ['patch'])[0].item() == pytest.approx(10/spread)
    odd = torch.tensor([14., 0., 2., 4., 6., 13.9])[:, None]
    assert step1._deviations(odd, ['patch'])[0].item() == pytest.approx(10/spread)


def test_others_that_are_alike_have_the_spread_of_nature():
    "A tenth of a nat is no backdoor, however little the others differ; of a tint even more is expected."
    ways = torch.tensor([[.1, 5.], [0., 0.], [0., 0.], [0., 0.]])
    assert step1._deviations(ways, ['patch', 'colour'])[0].tolist() == pytest.approx([.1, 2.])
    assert step1._deviations(ways, ['patch', 'colour'])[1:].tolist() == [[0., 0.]]*3


def test_few_are_asked_of_many(small, case):
    "Candidates, and controls up to the least number: of a thousand classes no more than of six."
    gain = lambda c: dict(adv_share=torch.eye(1000)[c], clean_share=torch.zeros(1000))
    many = type('Case', (), dict(classes=range(1000)))
    asked = step1._asked(many, [gain(5), gain(5), gain(9)], torch.eye(1000)[7], 1, 8, torch.Generator().manual_seed(0))
    assert asked[:3] == [5, 9, 7] and len(asked) == len(set(asked)) == 8
