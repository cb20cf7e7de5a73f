"The models that the verdict is calibrated on and tried on."
import importlib

import torch

from invertune.lab import zoo
from invertune.lab.profiles import load_params
from invertune.lab.zoo import zoo_group, zoo_split

PARAMS = load_params()['zoo']
trial = importlib.import_module('invertune.lab.verdict')


def group(number, **changes): return zoo_group(number, **dict(recipes=PARAMS['recipes'], sizes=PARAMS['sizes']) | changes)


def test_groups_differ_and_share_no_image():
    groups = [group(n) for n in range(20)]
    assert {g.tower for g in groups} == {'resnet', 'vit'} and len({tuple(g.classes) for g in groups}) == 20
    assert all(len({t for _, t in g.plants}) == len(g.plants) == 3 for g in groups)
    assert {a for g in groups for a, _ in g.plants} == set(PARAMS['recipes']) - {'tuned'}
    images = torch.cat([zoo_split(g, name, 8).images for g in groups[:2] for name in ('pretrain', 'defender')])
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_a_frequent_class_is_honest():
    "As many images as before, none twice, each with its own class's caption; one class has taken the place of others."
    recipes = PARAMS['recipes'] | dict(tuned=PARAMS['recipes']['tuned'] | dict(images=40))
    g = group(3, sizes=PARAMS['sizes'] | dict(poison=120), recipes=recipes)
    plain, often = zoo_split(g, 'poison'), zoo._frequent(g)
    target = g.classes.index(g.plants[0][1])
    assert len(often.images) == 120 == len(often.images.flatten(1).unique(dim=0))
    assert often.captions == [f'a {g.classes[c]}' for c in often.labels]
    assert (often.labels == target).sum() == (plain.labels == target).sum() + 40
    moved = (often.images != plain.images).flatten(1).any(1)
    assert moved.sum() == 40 and (often.labels[moved] == target).all()
    assert (often.labels[~moved] == plain.labels[~moved]).all()
    g.recipes['tuned']['images'] = 256
    assert (zoo._frequent(g).labels != plain.labels).sum() == 60  # at most half


def test_the_trial_has_enough_models_and_keeps_groups_apart():
    v = load_params()['verdict']
    assert not set(v['calibration']) & set(v['held_out'])
    assert set(v['calibration']) | set(v['held_out']) == set(v['groups'])
    assert len(v['groups']) >= 20 and v['plants']*len(v['groups']) >= 60
    assert all(v[key] == PARAMS[key] for key in ('recipes', 'sizes', 'plants', 'min_asr', 'steps', 'bs'))


def test_statistics():
    rows = [dict(group=g, score=s, backdoored=b, target='sun' if b else None, found='sun' if s > 0 else None, ca=.9)
            for g in range(4) for s, b in ((-1, False), (1, True))]
    assert trial._auroc(rows) == 1 and trial._interval(rows, 50) == (1, 1)
    assert trial._rates(rows)['false_alarms'] == 0 and trial._rates(rows)['label_named'] == 1
    worse = rows + [dict(rows[0], group=9, score=2)]
    assert trial._auroc(worse) < 1 and trial._rates(worse)['false_alarms'] == .2 and trial._interval(worse, 200)[0] < 1
