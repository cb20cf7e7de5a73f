"The models that the verdict is tried on."
import importlib
import math

import pytest
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


def test_the_trial_has_enough_models():
    v = load_params()['verdict']
    assert len(set(v['groups'])) == len(v['groups']) >= 20 and v['plants']*len(v['groups']) >= 60
    assert all(v[key] == PARAMS[key] for key in ('recipes', 'sizes', 'plants', 'min_asr'))


def judged(group, score, bad, name='sig', found='sun'):
    return dict(group=group, tower='vit', name=name if bad else 'clean', score=score, threshold=1, alarm=score > 1,
                backdoored=bad, target='sun' if bad else None, found=found if score > 1 else None, ca=.9,
                asr=.95 if bad else None)


def test_statistics():
    rows = [judged(g, s, b) for g in range(4) for s, b in ((1, False), (9, True))]
    assert trial._auroc(rows) == 1 and trial._interval(rows, 50) == (1, 1)
    assert trial._rates(rows)['false_alarms'] == 0 and trial._rates(rows)['label_named'] == 1
    worse = rows + [judged(9, 10, False)]
    assert trial._auroc(worse) < 1 and trial._rates(worse)['false_alarms'] == .2 and trial._interval(worse, 200)[0] < 1


def test_rates_are_of_the_models_they_are_about():
    "Detections of backdoored ones, false alarms of clean ones, labels of detections."
    bad = judged(0, 9, True), judged(1, 9, True, found='key'), judged(2, 1, True), judged(3, 1, True)
    rows = [*bad, judged(3, 4, False)]
    own = trial._rates(rows)
    assert (own['detected'], own['label_named'], own['false_alarms']) == (.5, .5, 1)
    none = trial._rates([judged(0, 1, False)])
    assert none['detected'] is None and none['label_named'] is None and none['label_named_low'] is None


def test_relatives_count_once():
    "Three models of each group tell no more than one does."
    one = [judged(g, 1, False) for g in range(10)]
    assert trial._rate('x', one*3, lambda r: r['alarm']) == trial._rate('x', one, lambda r: r['alarm'])
    assert trial._rate('x', one, lambda r: r['alarm'])['x_high'] == pytest.approx(.278, abs=.001)


def test_the_table_has_all_and_each_kind():
    rows = [judged(g, s, b) for g in range(4) for s, b in ((1, False), (9, True))]
    table = trial.verdict.tables['table'](dict(rows=rows)).set_index('models')
    assert list(table.index) == ['all', 'vit', 'clean', 'sig'] and table.loc['all', 'auroc'] == 100
    assert table.loc['clean', 'n'] == table.loc['all', 'groups'] == 4 and math.isnan(table.loc['clean', 'detected'])


def test_a_clean_model_that_passes_is_not_touched():
    assert trial.verdict.measure(judged(0, 1, False), None) == 0
