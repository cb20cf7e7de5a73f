"A verdict is given from the model, clean images and class names; a model without a backdoor comes out as it went in."
import ast
import inspect

import pytest
import torch
import yaml

from invertune import verdict
from invertune.attacks import ATTACKS
from invertune.defender import Clean
from invertune.identify import halves, sags
from invertune.lab.profiles import ROOT
from invertune.runtime import InvertuneError
from invertune.verdict import PATCHES, WHOLE, agreement, beyond, calibrate, collapse, features, gather, judge, mend, scan, score
from invertune.lab.zoo import SHAPES, SIZES, auroc, interval, rates, zoo_frequent, zoo_group, zoo_split

USUAL = {f: (.5, .1) for f in (*WHOLE, *PATCHES)}
NEVER, ALWAYS = ({'usual': {'resnet': USUAL}, 'names': ['local'], 'mean': [0.], 'scale': [1.], 'weights': [0.], 'bias': b} for b in (-1., 1.))
SHORT = dict(steps=2, bs=8, families=('patch of 49', 'warp'))


@pytest.fixture(scope='module')
def clean(small):
    d = small.defender
    return Clean(d.images[:64].clone(), list(d.captions[:64]), small.classes, small.templates)


def row(family, alike, *shares, sag=0.): return dict(family=family, alike=alike, shares=list(shares), sag=sag)


def test_features():
    "The most unusual row, the class that most images end at, under patches and under the rest, and how far one sags that is led to."
    f = features([row('patch of 28', .99, .1, .9, sag=.05), row('patch of 49', .5, .4, .6, sag=.3), row('warp', .9, .7, .3, sag=-.2)], USUAL)
    assert f == pytest.approx(dict(excess=1.5/.2, local=.75, whole=.7, sag=.1*.6), abs=1e-6)  # beyond .1 a sag says no more
    assert beyond(row('warp', 1., .5, .5), USUAL) == 8 and beyond(row('warp', 0., .5, .5), USUAL) == pytest.approx(-2.5)  # not infinite
    assert agreement([]) == 0


def test_judge_names_a_target_only_with_a_backdoor():
    evidence = [row('patch of 28', .99, .1, .9), row('blend', .5, 1., 0.)]
    yes, no = (judge(evidence, 'resnet', ['sun', 'key'], c) for c in (ALWAYS, NEVER))
    assert yes.backdoored and yes.target == 'key' and yes.family == 'patch of 28' and yes.probability > .5
    assert not no.backdoored and no.target is None and no.probability < .5
    with pytest.raises(InvertuneError, match='knows no clean vit'): judge(evidence, 'vit', ['sun', 'key'], ALWAYS)


def test_calibration_weighs_both_kinds_alike():
    "Ten times as many clean models do not move the verdict to their side."
    model = lambda alike: [row('blend', alike, .5, .5), row('patch of 28', alike, .5, .5)]
    low, high = [model(a) for a in (.5, .6, .7)], [model(a) for a in (.97, .98, .99)]
    c = calibrate(low*10 + high, ['vit']*33, [False]*30 + [True]*3)
    said = lambda a: score(c, features(model(a), c['usual']['vit']))
    assert said(.7) < 0 < said(.97)
    with pytest.raises(InvertuneError, match='there is no backdoored one'): calibrate(low, ['vit']*3, [False]*3)
    with pytest.raises(InvertuneError, match='there is no clean resnet'): calibrate(low + high, ['vit']*5 + ['resnet'], [False]*3 + [True]*3)


def test_scan_repeats_and_touches_nothing(small, clean):
    before = {k: v.clone() for k, v in small.bad.state_dict().items()}
    one, two = (scan(small.bad, clean, calibration=ALWAYS, **SHORT) for _ in range(2))
    assert one == two and all(torch.equal(v, before[k]) for k, v in small.bad.state_dict().items())


def test_mend_leaves_an_innocent_model_alone(small, clean, monkeypatch):
    monkeypatch.setattr(verdict, 'gather', lambda *args, **kw: [row('blend', .9, 1., 0.)])
    same, said = mend(small.bad, clean, calibration=NEVER)
    assert not said.backdoored and all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), small.bad.state_dict().values()))
    tuned, said = mend(small.bad, clean, calibration=ALWAYS, defense='ft', epochs=1, bs=32)
    assert said.backdoored and any(not torch.equal(a, b) for a, b in zip(tuned.state_dict().values(), small.bad.state_dict().values()))


def test_the_search_asks_no_class(small, clean):
    "What the search does is the same for any head; only its reading differs."
    head = clean.head(small.bad)
    one, two = (collapse(small.bad, *halves(clean.images), h, 'blend', steps=2, bs=8) for h in (head, head[:3]))
    assert one['alike'] == two['alike']


def test_gather_tells_the_sag_of_the_class_that_is_led_to(small, clean):
    head = clean.head(small.bad)
    found = gather(small.bad, clean.images, head, **SHORT)
    sag = sags(small.bad, clean.images, head)
    assert len(found) == 4 and all(r['sag'] == sag[torch.tensor(r['shares']).argmax()] for r in found)


def test_verdict_opens_no_secret():
    tree = ast.parse(inspect.getsource(verdict))
    sources = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not sources & {'attacks', 'data', 'stages', 'zoo'}


def test_groups_differ_and_share_no_image():
    groups = [zoo_group(n) for n in range(20)]
    assert {g.tower for g in groups} == set(SHAPES) and all(len({t for _, t in g.plants}) == len(g.plants) == 3 for g in groups)
    assert {a for g in groups for a, _ in g.plants} == set(ATTACKS) and len({tuple(g.classes) for g in groups}) == 20
    images = torch.cat([zoo_split(g, name, 8).images for g in groups[:2] for name in ('pretrain', 'defender')])
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_a_frequent_class_is_honest():
    "As many images as before, none twice, each with its own class's caption; one class has taken the place of others."
    g = zoo_group(3, sizes=dict(SIZES, poison=120))
    plain, often = zoo_split(g, 'poison'), zoo_frequent(g, 40)
    target = g.classes.index(g.plants[0][1])
    assert len(often.images) == 120 == len(often.images.flatten(1).unique(dim=0)) and often.captions == [f'a {g.classes[c]}' for c in often.labels]
    assert (often.labels == target).sum() == (plain.labels == target).sum() + 40
    moved = (often.images != plain.images).flatten(1).any(1)
    assert moved.sum() == 40 and (often.labels[moved] == target).all() and (often.labels[~moved] == plain.labels[~moved]).all()
    assert (zoo_frequent(g).labels != plain.labels).sum() == 60  # at most half


def test_the_trial_has_enough_models_and_keeps_groups_apart():
    v = yaml.safe_load((ROOT/'params.yaml').read_text())['verdict']
    assert not set(v['calibration']) & set(v['held_out']) and set(v['calibration']) | set(v['held_out']) == set(v['groups'])
    assert len(v['groups']) >= 20 and v['plants']*len(v['groups']) >= 60


def test_statistics():
    rows = [dict(group=g, score=s, backdoored=b, target='sun' if b else None, found='sun' if s > 0 else None, ca=.9) for g in range(4) for s, b in ((-1, False), (1, True))]
    assert auroc(rows) == 1 and interval(rows, 50) == (1, 1) and rates(rows)['false_alarms'] == 0 and rates(rows)['target'] == 1
    worse = rows + [dict(rows[0], group=9, score=2)]
    assert auroc(worse) < 1 and rates(worse)['false_alarms'] == .2 and interval(worse, 200)[0] < 1
