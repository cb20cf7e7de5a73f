"A population under every defense: the drawn part, the rows of a victim, and what is counted."
import pytest

import invertune.lab.unseen as unseen_module
from invertune.lab.plant import Planted, _parts
from invertune.lab.population import draw_trigger
from invertune.lab.profiles import load_params
from invertune.lab.unseen import unseen
from invertune.lab.victim import demo_victim
from invertune.runtime import InvertuneError


def test_the_drawn_part_is_half_and_half():
    params, kinds = load_params()['unseen'], load_params()['plant']['kinds']
    names = unseen_module._dozen(params, kinds)
    chosen = [_parts(name)[0] for name in names]
    assert len(set(chosen)) == params['quick'] and sum(kind in kinds['held_out'] for kind in chosen) == params['quick']//2
    assert names == unseen_module._dozen(params, kinds) and set(names) <= set(params['attacks'])


def victim(took=True):
    "The demonstration's model with a trigger that it was not taught."
    base = demo_victim()
    trigger = draw_trigger('wave', 0, 32, 1.)
    trigger.meta['target'] = 'umbrella'
    return Planted(base.dataset, 0, 'wave-0', base.clean, base.clip, [trigger], 0, [dict(took=took)])


def test_one_victim_is_defended_with_few_and_with_all_images():
    short = dict(epochs=1, bs=16)
    rows = unseen.measure(victim(), {'none': {}, 'ft': short, 'cleanclip': short}, {'ft': [32, 0]})
    assert [(r['defense'], r['images']) for r in rows] == [('none', 0), ('ft', 32), ('ft', 0), ('cleanclip', 0)]
    assert all(r['kind'] == 'wave' and r['took'] and r['strength'] == 1. and r['robust_clean'] <= 1 for r in rows)


def test_what_did_not_take_is_not_defended():
    row, = unseen.measure(victim(took=False), {'none': {}, 'ft': {}}, {})
    assert row['defense'] == 'none' and row['took'] is False


def test_more_images_than_the_defender_has_are_refused():
    with pytest.raises(InvertuneError, match='the defender has'): unseen.measure(victim(), {'ft': {}}, {'ft': [10**6]})


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
