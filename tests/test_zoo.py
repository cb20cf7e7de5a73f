"The models that the verdict is calibrated on and tried on."
import pytest
import torch
import yaml

from invertune.attacks import ATTACKS
from invertune.lab.profiles import ROOT
from invertune.lab.zoo import SHAPES, SIZES, auroc, interval, rates, zoo_frequent, zoo_group, zoo_split


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
