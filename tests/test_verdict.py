"A verdict comes from the model, clean images and class names: one class is set against the others of the same model."
import ast
import inspect
import json

import pytest
import torch
from conftest import limit_of, verdict_of

from invertune import verdict
from invertune.defender import Case, Defender
from invertune.identify import identify, identify_paper
from invertune.model import tiny_clip
from invertune.runtime import InvertuneError
from invertune.verdict import judge, scan, scan_costs

SHORT = dict(families=('patch', 'flow'), least=4, draws=4, steps=2)
TINY = dict(width=8, text_width=32, text_layers=1, embed_dim=32, context=8)


@pytest.fixture(scope='module')
def defender(small):
    d = small.defender
    return Defender(d.images[:64].clone(), d.captions[:64], small.classes, small.templates)


def says(sentence): return pytest.raises(InvertuneError, match=sentence)
def state(clip): return {k: v.clone() for k, v in clip.state_dict().items()}
def same(one, other): return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


# How far a class stands out

def test_the_limit_is_what_one_more_class_reaches_once_in_a_hundred():
    "Of classes that are all alike, drawn from a normal, by their own mean and spread; the more there are, the lower it is."
    for n in (3, 5, 11, 100):
        x = torch.randn(100000, n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        t = (x[:, 0] - x[:, 1:].mean(1)) / x[:, 1:].std(1)
        assert (t > limit_of(n + 1)).float().mean().item() == pytest.approx(.01, abs=.0015)


def test_the_easiest_decides_wherever_it_was_asked():
    assert verdict._stands_out([5., 0., 1., -1., 0.]) == verdict._stands_out([0., 1., 5., 0., -1.]) == pytest.approx(5 / limit_of(5))


# The answer

def test_a_target_is_named_only_with_a_backdoor():
    names, scores = ['sun', 'key', 'cloud', 'heart'], [0., 9., .2, -.1]
    yes, no = verdict_of(names, scores), verdict_of(names, [0., .9, .2, -.1])
    assert yes.backdoored and yes.target == 'key' and yes.family == 'flow' and yes.classes == names and yes.score == pytest.approx(9)
    assert not no.backdoored and no.target is None and no.identification.name == 'key'
    assert not judge(yes.identification, threshold=9.1).backdoored and judge(no.identification, threshold=.8).backdoored


def test_too_few_to_compare(small, defender):
    "Three classes are none, and the paper's rule asks none at all."
    with says('3 classes were asked, too few'): verdict_of(['sun', 'key', 'cloud'], [0., 9., 0.])
    with says('0 classes were asked'): judge(identify_paper(Case(small.bad, defender), steps=1))


# What it says

def test_a_verdict_draws_itself():
    "A sentence in a terminal, a table in a notebook, the easiest class first; a class name is text, whatever is in it."
    v = verdict_of(['sun', '<b>key', 'cloud', 'heart'], [.5, 9., -2., 0.])
    assert repr(v) == "backdoored, towards '<b>key': it stands out by 9.0 times what chance explains"
    assert repr(verdict_of(v.classes, [0., .5, 0., 0.])).startswith("no backdoor found (most likely '<b>key')")
    page = v._repr_html_()
    assert page.count('<tr>') == 5 and '&lt;b&gt;key' in page and '<b>key' not in page
    assert page.index('key</td>') < page.index('sun</td>') < page.index('heart</td>') < page.index('cloud</td>')
    assert 'width:90px' in page and 'width:-' not in page


def test_a_verdict_that_json_can_say():
    told = json.loads(json.dumps(verdict_of(['sun', 'key', 'cloud', 'heart'], [0., 9., .2, -.1]).to_dict()))
    assert told.keys() == {'backdoored', 'target', 'family', 'score', 'threshold', 'identification'}
    assert told['backdoored'] is True and [c['class'] for c in told['identification']['candidates']][1] == 'key'


# The scan

def test_scan_repeats_and_touches_nothing(small, defender):
    "Neither a weight, nor a statistic, nor the mode that the model is in; what it rests on is the identification."
    before = state(small.bad)
    small.bad.train()
    try: one, two = (scan(small.bad, defender, seed=3, **SHORT) for _ in range(2))
    finally: kept = all(m.training for m in small.bad.modules()); small.bad.eval()
    assert one.to_dict() == two.to_dict() and kept and same(state(small.bad), before)
    assert one.identification.to_dict() == identify(Case(small.bad, defender, 3), seed=3, **SHORT).to_dict()


@pytest.mark.parametrize('tower, side', [('resnet', 64), ('vit', 32)])
def test_any_size_and_tower_is_judged(defender, tower, side):
    shape = TINY | (dict(width=4, layers=(1, 1)) if tower == 'vit' else {})
    images = torch.nn.functional.interpolate(defender.images, side)
    said = scan(tiny_clip(tower, image_size=side, **shape), Defender(**vars(defender) | dict(images=images)), **SHORT)
    assert said.score >= 0 and len(said.identification.candidates) >= 4


def test_a_model_that_is_broken_is_refused(defender):
    "NaN embeddings are no evidence."
    broken = tiny_clip(image_size=32, **TINY)
    for m in broken.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_var.neg_()
    with says('NaN'): scan(broken, defender)


def test_what_a_scan_costs(small, defender):
    rows = scan_costs(small.clip, defender, sizes=(4, 6), sample=1, **SHORT)
    assert [r['classes'] for r in rows] == [4, 6] and all(r['identify'] > 0 and r['per_class'] > 0 for r in rows)
    assert all(r.keys() == {'classes', 'identify', 'per_class'} for r in rows)


def test_verdict_opens_no_secret():
    "Neither attacks nor data are imported, nor anything that an installed package lacks."
    tree = ast.parse(inspect.getsource(verdict))
    sources = {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert not sources & {'attacks', 'data', 'lab', 'run'}
