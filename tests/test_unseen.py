"A population, planted: names, poisons, steps of strength, and what is counted."
import pytest
import torch

import invertune.lab.unseen as unseen_module
from invertune.attacks import Setup, demo_split
from invertune.lab.population import POPULATION, draw_trigger
from invertune.lab.profiles import load_params
from invertune.lab.unseen import unseen
from invertune.lab.victim import demo_victim
from invertune.runtime import InvertuneError

SHORT = dict(epochs=1, lr=1e-4, bs=16)


@pytest.fixture(scope='module')
def setup(small): return Setup(small.clip, demo_split(96, 5*10**6), small.classes, small.templates, 'umbrella')


def poisoned(setup, kind, n=12):
    "Which images were changed, their captions, and all captions."
    trigger = draw_trigger(kind, 0, 32, 1.)
    images, texts = unseen_module._poison_pairs(setup, trigger, POPULATION[kind].poison, n)
    at = (images != setup.split.images).flatten(1).any(1).nonzero().flatten().tolist()
    return at, [i for i in range(len(texts)) if texts[i] != setup.split.captions[i]], texts


# Names

def test_every_trigger_has_a_kind_and_a_seed_and_both_sides_have_several_of_each():
    params = load_params()['unseen']
    kinds = [unseen_module._parts(name)[0] for name in params['attacks']]
    assert len(set(params['attacks'])) == len(kinds) and set(kinds) == set(POPULATION)
    assert min(kinds.count(kind) for kind in POPULATION) >= 2


def test_both_clean_models_are_used_and_the_stage_depends_on_them():
    from invertune.lab.profiles import ROOT, read_yaml
    params, stages = load_params()['unseen'], read_yaml((ROOT/'dvc.yaml').read_text(), 'dvc.yaml')['stages']
    deps = stages['unseen']['deps']
    for seed in sum(params['victims'].values(), []):
        assert f'results/${{item.profile}}/train/{seed}/model.safetensors' in deps
    assert not {*params['victims']['development']} & {*params['victims']['held_out']}
    assert {unseen_module._parts(name)[1] % 2 for name in params['attacks']} == {0, 1}


def test_the_drawn_part_is_half_and_half():
    params = load_params()['unseen']
    chosen = [unseen_module._parts(name)[0] for name in unseen_module._dozen(params)]
    assert len(set(chosen)) == params['quick']
    assert sum(kind in params['held_out'] for kind in chosen) == params['quick']//2
    assert unseen_module._dozen(params) == unseen_module._dozen(params)


def test_a_kind_stands_on_one_side():
    for kinds, words in ([], 'no side'), (['wave'], 'both sides'):
        with pytest.raises(InvertuneError, match=words):
            unseen_module._side_of('wave', dict(development=kinds, held_out=kinds))


def test_targets_are_drawn():
    classes = [f'class {i}' for i in range(20)]
    targets = [unseen_module._target(f'wave-{seed}', classes) for seed in range(20)]
    assert len(set(targets)) > 8 and targets[3] == unseen_module._target('wave-3-vit', classes)


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
    bright = unseen_module._is_bright(setup.split.images)
    assert .3 < bright.float().mean() < .7
    images, _ = unseen_module._poison_pairs(setup, draw_trigger('wave', 0, 32, 1.), 'one domain', 12)
    assert not (images != setup.split.images).flatten(1).any(1)[~bright].any()


def test_more_poisons_than_images_are_refused(setup):
    with pytest.raises(InvertuneError, match='ask for fewer'): poisoned(setup, 'two-marks', 60)


# Planting

def test_strength_is_raised_until_it_takes(monkeypatch):
    "The first strength that is learned is kept; where none is, no defense is tried and the row says so."
    base, tried = demo_victim(), []
    def taught(setup, kind, strength, **recipe):
        tried.append(strength)
        trigger = draw_trigger(kind, setup.seed, setup.side, strength)
        trigger.meta['target'] = setup.target
        return setup.clip, trigger
    monkeypatch.setattr(unseen_module, '_poisoned', taught)
    asr = {.2: .1, .5: .95, 1.: .99}
    row = unseen_module._row
    given = lambda v, *a, **k: row(v, *a, **k) | dict(asr=asr[v.triggers[0].meta['strength']])
    monkeypatch.setattr(unseen_module, '_row', given)
    def measured(strengths):
        return unseen.measure('wave-0', base.dataset, base.clean, 0, {'none': {}}, [0], recipe={}, max_drop=.1,
                              strengths=strengths)
    _, steps, rows = measured([.2, .5, 1.])
    assert tried == [.2, .5] and [s['took'] for s in steps] == [False, True] and rows[0]['took']
    called = []
    monkeypatch.setattr(unseen_module, '_defended', lambda *a: called.append(a))
    _, steps, rows = measured([.2])
    assert not called and len(rows) == 1 and rows[0]['took'] is False


def test_one_trigger_from_end_to_end():
    "Planted, defended with few and with all images; what is planted is seen by the model alone."
    base = demo_victim()
    weights = [p.clone() for p in base.clean.parameters()]
    how = dict(recipe=dict(poisons=48, **SHORT), strengths=[1.], min_asr=0., max_drop=1.)
    params = {'none': {}, 'ft': dict(epochs=1, bs=16)}
    victim, steps, rows = unseen.measure('wave-1', base.dataset, base.clean, 0, params, [32, 0], **how)
    assert [(r['defense'], r['images']) for r in rows] == [('none', 0), ('ft', 32), ('ft', 0)]
    assert all(r['kind'] == 'wave' and r['took'] and r['strength'] == 1. and r['robust_clean'] <= 1 for r in rows)
    assert victim.target == rows[0]['target'] == unseen_module._target('wave-1', base.dataset.classes)
    assert all(torch.equal(p, w) for p, w in zip(base.clean.parameters(), weights))


def test_a_vit_keeps_the_text_tower(setup):
    vit = unseen_module._vit_tower(setup.clip, setup.split, width=4, epochs=1, lr=1e-4, bs=16)
    own, theirs = vit.model.state_dict(), setup.clip.model.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in theirs if not k.startswith('visual.'))
    assert all(p.requires_grad for p in vit.parameters())


# What is counted

def run(kind, defense, asr, robust=.5, draw=0, images=0, side='held out', target='sun', **more):
    return dict(attack=f'{kind}-{draw}', kind=kind, group='pattern', side=side, defense=defense, images=images, seed=12,
                target=target, found=None, failed=None, took=True, strength=.3, asr=asr, robust=robust, robust_clean=.8,
                asr_any=asr, ca=.9, ca_clean=.92) | more


@pytest.fixture
def data():
    "Two triggers of one kind, one without a target, one lost, one that did not take, one for development."
    rows = [run('rings', 'none', .99), run('rings', 'none', .99, draw=1), run('untargeted', 'none', .95, target=''),
            run('lines', 'none', .99), run('shear', 'none', .4, took=False), run('wave', 'none', .99, side='development')]
    rows += [run('rings', 'invertune', .02, .7, found='sun', ca=.88),
             run('rings', 'invertune', .3, .6, draw=1, found='cat'),
             run('untargeted', 'invertune', .5, .4, target='', found='sun'),
             run('lines', 'invertune', 0., 0., found='sun', ca=.1),
             run('wave', 'invertune', 1., side='development', found='cat'),
             run('rings', 'invertune', .9, images=100)]
    return dict(rows=rows, missing=3, pictures={})


def test_the_summary_is_of_the_held_out_kinds_alone(data):
    told = unseen.summary(data)
    assert (told['runs'], told['kinds'], told['lost'], told['failed'], told['missing']) == (4, 3, 1, 0, 3)
    assert told['named'] == .5                            # rings-0 and the lost one; a label without a target is wrong
    assert told['asr_mean'] == .16 and told['asr_over_10'] == .5
    assert told['robust_gap_mean'] == pytest.approx((.1 + .2 + .4)/3, abs=1e-4)
    assert told['ca_drop_mean'] == pytest.approx(.02/3, abs=1e-4)


def test_to_name_no_label_is_right_where_there_is_no_target():
    assert unseen_module._is_named(run('untargeted', 'invertune', .1, target='', found=None))
    assert not unseen_module._is_named(run('rings', 'invertune', .1, found=None))


def test_tables_keep_the_sides_and_the_numbers_of_images_apart(data):
    table = unseen.tables['table'](data)
    assert list(zip(table['split'], table['defense'], table['images'])) == [
        ('held out', 'none', 'all'), ('held out', 'invertune', 'all'), ('held out', 'invertune', '100'),
        ('development', 'none', 'all'), ('development', 'invertune', 'all')]
    assert list(table['runs']) == [4, 4, 1, 1, 1] and list(table['lost'])[1] == 1
    kinds = unseen.tables['kinds'](data).set_index('kind')
    assert kinds.loc['shear', 'took'] == '0 of 1' and kinds.loc['rings', 'named'] == '1 of 2'
    assert 'no target' in kinds.loc['untargeted', 'note'] and kinds['asr'].isna()['untargeted']
    rows = unseen.tables['rows'](data)
    assert len(rows) == len(data['rows']) and list(rows['note']).count('did not take') == 1


def test_the_sentences_say_what_is_missing_and_what_has_no_target(data):
    said = unseen.said(data)
    assert '1 did not take, 3 are still to be planted' in said[0] and 'without a target' in said[-1]
    assert said[1].startswith('Held-out kinds, invertune with all images: the label named rightly in 50 % of 4 runs')


def test_nothing_measured_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen_module, 'result_dir', lambda *key: tmp_path.joinpath(*map(str, key)))
    with pytest.raises(InvertuneError, match='run `make unseen` first'): unseen.load('glyphs')
