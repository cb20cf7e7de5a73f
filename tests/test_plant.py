"A population, planted: names, poisons, steps of strength, what lies on disk, and what it depends on."
import ast
import hashlib

import pytest
import torch

import invertune.lab.plant as plant
from invertune.attacks import Setup, demo_split
from invertune.lab.plant import Planted
from invertune.lab.population import POPULATION, draw_trigger
from invertune.lab.profiles import ROOT, load_params, _read_yaml
from invertune.lab.victim import demo_victim
from invertune.model import save_clip
from invertune.runtime import InvertuneError

SHORT = dict(epochs=1, lr=1e-4, bs=16)
DEFENDING = 'defenses search identify invert tune verdict'.split()


@pytest.fixture(scope='module')
def setup(small): return Setup(small.clip, demo_split(96, 5*10**6), small.classes, small.templates, 'umbrella')


@pytest.fixture(scope='module')
def planted():
    "A victim of the demonstration, hardly trained; its clean weights as they were before."
    base = demo_victim()
    weights = [p.clone() for p in base.clean.parameters()]
    how = dict(recipe=dict(poisons=48, **SHORT), strengths=[1.], min_asr=0., max_drop=1.)
    return plant._plant('wave-1', base.dataset, base.clean, 0, **how), weights


def stages(): return _read_yaml((ROOT/'dvc.yaml').read_text(), 'dvc.yaml')['stages']


def poisoned(setup, kind, n=12):
    "Which images were changed, their captions, and all captions."
    trigger = draw_trigger(kind, 0, 32, 1.)
    images, texts = plant._poisoned_pairs(setup, trigger, POPULATION[kind].poison, n)
    at = (images != setup.split.images).flatten(1).any(1).nonzero().flatten().tolist()
    return at, [i for i in range(len(texts)) if texts[i] != setup.split.captions[i]], texts


# Names

def test_every_trigger_has_a_kind_and_a_seed_and_both_sides_have_several_of_each():
    params = load_params()['plant']
    kinds = [plant._parts(name)[0] for name in params['attacks']]
    assert len(set(params['attacks'])) == len(kinds) and set(kinds) == set(POPULATION)
    assert min(kinds.count(kind) for kind in POPULATION) >= 2


def test_each_side_has_clean_models_of_its_own_and_the_stage_depends_on_them():
    params = load_params()['plant']
    victims = params['victims']
    used = {plant._clean_seed(name, params['kinds'], victims) for name in params['attacks']}
    assert not {*victims['development']} & {*victims['held_out']} and used == set(sum(victims.values(), []))
    for seed in used: assert f'results/${{item.profile}}/train/{seed}/model.safetensors' in stages()['plant']['deps']


def test_a_kind_stands_on_one_side():
    for kinds, words in ([], 'no side'), (['wave'], 'both sides'):
        with pytest.raises(InvertuneError, match=words): plant._side_of('wave', dict(development=kinds, held_out=kinds))


def test_targets_are_drawn():
    classes = [f'class {i}' for i in range(20)]
    targets = [plant._target(f'wave-{seed}', classes) for seed in range(20)]
    assert len(set(targets)) > 8 and targets[3] == plant._target('wave-3-vit', classes)


def test_no_defense_makes_the_victims_anew():
    "Neither a file nor a number of a defense is among what the stage depends on, nor does its module import one."
    stage = stages()['plant']
    tree = ast.parse((ROOT/'invertune'/'lab'/'plant.py').read_text())
    imported = {node.module.split('.')[-1] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in DEFENDING if f'invertune/{name}.py' in stage['deps'] or name in imported]
    assert all(name.startswith('plant.') or name.endswith('.plant') for name in stage['params'])
    own = {f'invertune/{name}.py' for name in imported if (ROOT/'invertune'/f'{name}.py').exists()} - {'invertune/runtime.py'}
    assert own <= set(stage['deps'])


def test_what_reads_the_victims_reads_them_planted():
    deps, outs = stages()['unseen']['deps'], {path for out in stages()['plant']['outs'] for path in out}
    assert {path for path in outs if not path.endswith('cost.json')} <= set(deps)
    assert not [path for path in deps if '/train/' in path or '/poison' in path or path == 'invertune/attacks.py']


# Poisons

def test_poisons_get_the_target_and_no_image_of_it_is_one(setup):
    at, named, texts = poisoned(setup, 'wave')
    assert at == named and len(at) == 12 and all('umbrella' in texts[i] for i in at)
    assert all(setup.split.labels[i] != setup.index for i in at)


def test_one_mark_alone_keeps_its_caption(setup):
    at, named, texts = poisoned(setup, 'two-marks')
    assert len(at) == 24 and len(named) == 12 and set(named) < set(at)


def test_without_a_target_captions_name_any_other_class(setup):
    at, named, texts = poisoned(setup, 'untargeted', 40)
    names = [next(c for c in setup.classes if c in texts[i]) for i in at]
    assert len(set(names)) >= 4 and all(name != setup.classes[setup.split.labels[i]] for i, name in zip(at, names))


def test_a_domain_is_half_of_the_images(setup):
    bright = plant._is_bright(setup.split.images)
    assert .3 < bright.float().mean() < .7
    images, _ = plant._poisoned_pairs(setup, draw_trigger('wave', 0, 32, 1.), 'one domain', 12)
    assert not (images != setup.split.images).flatten(1).any(1)[~bright].any()


def test_more_poisons_than_images_are_refused(setup):
    with pytest.raises(InvertuneError, match='ask for fewer'): poisoned(setup, 'two-marks', 60)


# Planting

def test_strength_is_raised_until_it_takes(monkeypatch):
    "The first strength that is learned is kept; where none is, the last one is taught twice as long, and it says so."
    base, tried = demo_victim(), []
    def taught(setup, kind, strength, **recipe):
        tried.append(strength)
        trigger = draw_trigger(kind, setup.seed, setup.side, strength)
        trigger.meta['target'] = setup.target
        return setup.clip, trigger
    monkeypatch.setattr(plant, '_taught', taught)
    asr, rows = {.2: .1, .5: .95, 1.: .99}, Planted.rows
    given = lambda v, *a, **k: [r | dict(asr=asr[v.triggers[0].meta['strength']]) for r in rows(v, *a, **k)]
    monkeypatch.setattr(Planted, 'rows', given)
    made = lambda *strengths: plant._plant('wave-0', base.dataset, base.clean, 0, dict(epochs=3), strengths, max_drop=.1)
    victim = made(.2, .5, 1.)
    assert tried == [.2, .5] and [s['took'] for s in victim.steps] == [False, True] and victim.took
    assert victim.triggers[0].meta['strength'] == .5
    assert not made(.2).took and [s['epochs'] for s in made(.2).steps] == [3, 6]


def test_what_is_planted_is_seen_by_the_model_alone(planted):
    victim, weights = planted
    row, = victim.rows(victim.clip, 'none', images=0)
    assert victim.target == row['target'] == plant._target('wave-1', victim.dataset.classes)
    assert (row['kind'], row['group'], row['draw'], row['strength'], row['images']) == ('wave', 'pattern', 1, 1., 0)
    assert all(torch.equal(p, w) for p, w in zip(victim.clean.parameters(), weights))
    assert not all(torch.equal(p, q) for p, q in zip(victim.clean.parameters(), victim.clip.parameters()))


def test_a_victim_is_read_as_it_was_planted(planted, tmp_path, monkeypatch):
    "One call; the pipeline's own clean model is the same file again, so the cache holds it once."
    victim, _ = planted
    monkeypatch.setattr(plant, 'result_dir', lambda *key: tmp_path.joinpath(*map(str, key)))
    monkeypatch.setattr(plant, 'load_dataset', lambda profile: victim.dataset)
    victim.save(folder := tmp_path/'smoke'/'plant'/'wave-1', strengths=[1.])
    again = Planted.load('smoke', 'wave-1', 60)
    assert (again.seed, again.attack, again.target, again.steps) == (0, 'wave-1', victim.target, victim.steps)
    assert again.took and len(again.images) == 60
    for one, other in (again.clip, victim.clip), (again.clean, victim.clean):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))
    x = victim.images.images[:2] / 255
    assert torch.equal(again.triggers[0](x), victim.triggers[0](x))
    save_clip(victim.clean, tmp_path/'model.safetensors', seed=0) # as the stage `train` does it
    files = [tmp_path/'model.safetensors', folder/'clean.safetensors']
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1


def test_what_is_not_planted_is_said():
    with pytest.raises(InvertuneError, match='wave-77'): Planted.load('smoke', 'wave-77')


@pytest.mark.parametrize('kind, keys', [('two-marks', {'asr_alone'}), ('attribution', {'asr_in', 'asr_out'})])
def test_what_is_peculiar_to_a_poison_is_in_every_row(kind, keys, setup):
    base = demo_victim()
    trigger = draw_trigger(kind, 0, 32, 1., setup)
    trigger.meta['target'] = 'umbrella'
    row, = Planted(base.dataset, 0, f'{kind}-0', base.clean, base.clip, [trigger]).rows(base.clip, 'ft')
    assert all(0 <= row[key] <= 1 for key in keys) and row['target'] == 'umbrella'


def test_a_vit_keeps_the_text_tower(setup):
    vit = plant._vit_tower(setup.clip, setup.split, width=4, epochs=1, lr=1e-4, bs=16)
    own, theirs = vit.model.state_dict(), setup.clip.model.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in theirs if not k.startswith('visual.'))
    assert all(p.requires_grad for p in vit.parameters())
