"A verdict is given from the model, clean images and class names; a model without a backdoor comes out as it went in."
import ast
import inspect
import json
import subprocess
import sys

import pytest
import torch

from invertune import verdict
from invertune.defender import Case, Defender
from invertune.model import tiny_clip
from invertune.runtime import InvertuneError, save_json
from invertune.search import text_image_gap
from invertune.verdict import calibrate, gather_evidence, judge, load_calibration, scan

FAMILIES = (*verdict._WHOLE, *verdict._PATCHES)
USUAL = {f: (.5, .1) for f in FAMILIES}
SHORT = dict(steps=2, bs=8, families=('patch of 49', 'warp'))
NEVER, ALWAYS = (dict(side=32, search=SHORT, usual=dict(resnet=USUAL), names=['local'], mean=[0.], scale=[1.],
                      weights=[0.], bias=b) for b in (-1., 1.))


@pytest.fixture(scope='module')
def defender(small):
    d = small.defender
    return Defender(d.images[:64].clone(), d.captions[:64], small.classes, small.templates)


def says(sentence): return pytest.raises(InvertuneError, match=sentence)
def state(clip): return {k: v.clone() for k, v in clip.state_dict().items()}
def same(one, other): return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
def row(family, alike, *shares, gap=0.): return dict(family=family, alike=alike, shares=list(shares), gap=gap)


def test_features():
    "The most unusual row, the class that most images end at, under patches and the rest, and its gap."
    rows = [row('patch of 28', .99, .1, .9, gap=.05), row('patch of 49', .5, .4, .6, gap=.3),
            row('warp', .9, .7, .3, gap=-.2)]
    f = verdict._features(rows, USUAL)
    assert f == pytest.approx(dict(excess=1.5/.2, local=.75, whole=.7, gap=.1*.6), abs=1e-6)  # over .1 it says no more
    assert verdict._excess(row('warp', 1., .5, .5), USUAL) == 8  # not infinite
    assert verdict._excess(row('warp', 0., .5, .5), USUAL) == pytest.approx(-2.5) and verdict._agreement([]) == 0


def test_judge_names_a_target_only_with_a_backdoor():
    evidence = [row('patch of 28', .99, .1, .9), row('blend', .5, 1., 0.)]
    yes, no = (judge(evidence, 'resnet', ['sun', 'key'], c) for c in (ALWAYS, NEVER))
    assert yes.backdoored and yes.target == 'key' and yes.family == 'patch of 28' and yes.probability > .5
    assert not no.backdoored and no.target is None and no.probability < .5
    with says('knows no clean vit'): judge(evidence, 'vit', ['sun', 'key'], ALWAYS)


def test_a_verdict_draws_itself():
    "A sentence in a terminal, a table in a notebook; a class name is text, whatever is in it."
    v = judge([row('patch of 28', .99, .1, .9), row('blend', .5, 1., 0.)], 'resnet', ['sun', '<b>key'], ALWAYS)
    assert repr(v).startswith("backdoored, towards '<b>key' (probability 0.73") and len(repr(v)) < 120
    page = v._repr_html_()
    assert page.count('<tr>') == 3 and '&lt;b&gt;key' in page and '<b>key' not in page and 'patch of 28' in page


def test_calibration_weighs_both_kinds_alike():
    "Ten times as many clean models do not move the verdict to their side."
    model = lambda alike: [row('blend', alike, .5, .5), row('patch of 28', alike, .5, .5)]
    low, high = [model(a) for a in (.5, .6, .7)], [model(a) for a in (.97, .98, .99)]
    c = calibrate(low*10 + high, ['vit']*33, [False]*30 + [True]*3, 32, {})
    said = lambda a: verdict._log_odds(c, verdict._features(model(a), c['usual']['vit']))
    assert said(.7) < 0 < said(.97)
    with says('there is no backdoored one'): calibrate(low, ['vit']*3, [False]*3, 32, {})
    with says('there is no clean resnet'):
        calibrate(low + high, ['vit']*5 + ['resnet'], [False]*3 + [True]*3, 32, {})


def test_the_calibration_of_the_package(tmp_path):
    "It says what it was made with; a file that is something else is refused."
    c = load_calibration()
    assert c['side'] == 32 and c['search'] == dict(steps=24, bs=24) and set(c['usual']) == {'resnet', 'vit'}
    assert all(set(u) == set(FAMILIES) for u in c['usual'].values())
    assert c['names'] == ['excess', 'local', 'whole', 'gap']
    defaults = {n: p.default for n, p in inspect.signature(gather_evidence).parameters.items()}
    assert {k: defaults[k] for k in c['search']} == c['search']
    save_json(tmp_path/'c.json', {k: v for k, v in c.items() if k != 'side'})
    with says('is no calibration of a verdict: it lacks side'): load_calibration(tmp_path/'c.json')
    save_json(tmp_path/'c.json', [1]); pytest.raises(InvertuneError, load_calibration, tmp_path/'c.json')


def test_the_calibration_is_read_from_the_package(tmp_path):
    "Wherever one stands, with nothing of the checkout beside the package."
    code = 'from invertune.verdict import load_calibration; print(load_calibration()["side"])'
    env = {'PYTHONPATH': inspect.getfile(verdict).removesuffix('/invertune/verdict.py')}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == '32', done.stderr


def test_a_calibration_that_does_not_fit_is_refused(small, defender, monkeypatch):
    "Models of another size are not judged, unless one says that a guess will do."
    monkeypatch.setattr(verdict, 'gather_evidence', lambda case, **kw: [row('blend', .9, 1., 0.)])
    large = tiny_clip(image_size=64, width=8, text_width=32, text_layers=1, embed_dim=32, context=8)
    own = Defender(**vars(defender) | dict(images=torch.nn.functional.interpolate(defender.images, 64)))
    with says('made with models for images of 32 pixels a side, but this one takes 64'): scan(large, own)
    with says('made with models for images of 224'): scan(small.bad, defender, calibration=NEVER | dict(side=224))
    scan(large, own, calibration=NEVER | dict(side=64)); scan(large, own, calibration=NEVER, force=True)
    with says('knows no clean resnet'): scan(small.bad, defender, calibration=NEVER | dict(usual=dict(vit=USUAL)))


def test_scan_repeats_and_touches_nothing(small, defender):
    "Neither a weight, nor a statistic, nor the mode that the model is in."
    before = state(small.bad)
    small.bad.train()
    try: one, two = (scan(small.bad, defender, calibration=ALWAYS) for _ in range(2))
    finally: kept = all(m.training for m in small.bad.modules()); small.bad.eval()
    assert one == two and kept and same(state(small.bad), before)


def test_sorted_images_are_scanned_as_well(small, defender):
    "An ImageFolder comes class after class: what is searched on and what is judged on have all classes."
    order = torch.tensor(sorted(range(64), key=lambda i: defender.captions[i]))
    d = Defender(defender.images[order], [defender.captions[i] for i in order], small.classes, small.templates)
    rows = [r for r in gather_evidence(Case(small.clip, d), steps=0, families=('blend',))]
    assert sum(s > 0 for s in rows[0]['shares']) >= 5  # a perturbation that has not moved leaves the classes apart


def test_a_model_that_is_broken_is_refused(small, defender):
    "NaN embeddings are no evidence."
    broken = tiny_clip(image_size=32, width=8, text_width=32, text_layers=1, embed_dim=32, context=8)
    for m in broken.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_var.neg_()
    with says('NaN'): scan(broken, defender)


def test_the_search_asks_no_class(small, defender):
    "What the search does is the same for any class names; only its reading differs."
    few = Defender(defender.images, defender.captions, small.classes[:3], small.templates)
    one, two = (gather_evidence(Case(small.bad, d), ('blend',), steps=2, bs=8)[0] for d in (defender, few))
    assert one['alike'] == two['alike'] and len(two['shares']) == 3


def test_evidence_tells_the_gap_of_the_class_that_is_led_to(small, defender):
    case = Case(small.bad, defender)
    found, gap = gather_evidence(case, **SHORT), text_image_gap(case)
    assert len(found) == 4 and all(r['gap'] == gap[torch.tensor(r['shares']).argmax()] for r in found)
    with says("unknown family 'fog'"): gather_evidence(case, ('fog',))


def test_verdict_opens_no_secret():
    "Neither attacks nor data are imported, nor anything that an installed package lacks."
    tree = ast.parse(inspect.getsource(verdict))
    sources = {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert not sources & {'attacks', 'data', 'lab', 'run'}
