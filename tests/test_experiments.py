"One word an experiment: module, stage, parameters, page; what was chosen is not at an edge; the zoo is pinned."
import importlib
import json
from functools import partial

import nbformat
import pytest

from invertune.attacks import ATTACKS, demo, register_attack
from invertune.defender import Case
from invertune.invert import Bank
from invertune.lab.profiles import EXPERIMENTS, NBS, RESULTS, load_params, named_params
from invertune.lab.tables import Experiment
from invertune.lab.zoo import zoo_group
from invertune.search import FAMILIES, random_perturbation


def of(word): return getattr(importlib.import_module(f'invertune.lab.{word}'), word)


@pytest.mark.parametrize('word', EXPERIMENTS)
def test_one_word_everywhere(word):
    "The module, its one name, its notebook, its stage where it has one, its section of params.yaml."
    made = of(word)
    assert isinstance(made,
                      Experiment) and made.word == word and made.question.endswith('?') and 'table' in made.tables and 'figure' in made.figures
    assert importlib.import_module(f'invertune.lab.{word}').__all__ == [word]
    assert len(list((NBS/'lab').glob(f'[0-9][0-9]_{word}.ipynb'))) == 1 and word in load_params()
    stages = list((NBS/'stages').glob(f'[0-9][0-9]_{word}.ipynb'))
    assert len(stages) == (0 if word in ('main', 'seeds')
                           else 1) and (made.measure is None) == (word in ('main', 'seeds'))


def parameters(notebook):
    "Names of the cell that is tagged as parameters."
    cell = next(c for c in nbformat.read(notebook, 4).cells if 'parameters' in c.metadata.get('tags', []))
    return {line.split(' = ')[0] for line in cell.source.splitlines()}


@pytest.mark.parametrize('word', [w for w in EXPERIMENTS if w not in ('main', 'seeds')] + ['plant', 'evaluate', 'zoo'])
def test_a_stage_declares_what_its_section_says(word):
    "A number that no notebook asks for would go unused."
    section = set(load_params()[word] or {}) - {'attacks'}
    assert section <= parameters(next((NBS/'stages').glob(f'[0-9][0-9]_{word}.ipynb')))


def test_the_variants_of_the_ablations_are_there():
    module = importlib.import_module('invertune.lab.ablations')
    known = {*module._PARTS, *module._BANKS, *module._LESS, module._PUBLISHED}
    assert set(load_params()['ablations']['variants']) == known - {module._WHOLE}


def test_every_variant_of_the_ablations_runs(monkeypatch):
    "Each with as little of everything as there is; inversions pass whatever they reach, for the tuning has to be run."
    module, d = importlib.import_module('invertune.lab.ablations'), demo()
    monkeypatch.setattr(module, 'invert', partial(module.invert, draws=2, keep=1, steps=2, trial=1, gate=0.))
    monkeypatch.setattr(module, 'invert_paper', partial(module.invert_paper, steps=20, gate=0., limit=1.))
    case, bank = Case(d.bad, d.defender), Bank([random_perturbation(family, 32) for family in FAMILIES], [1.]*len(FAMILIES))
    for name in [*module._PARTS, *module._BANKS, *module._LESS, module._PUBLISHED]:
        made, failed = module._ablate(name, case, 0, bank, steps=2)
        assert made is not d.bad and not failed, name


# Selection

def tried(defense, setting, ca, asr, attack='badnet', robust=0.):
    return dict(attack=attack, defense=defense, setting=setting, ca=ca, asr=asr, robust=robust, ca_clean=.92,
                robust_clean=.8, failed=None)


@pytest.fixture
def module(): return importlib.import_module('invertune.lab.selection')


UNDEFENDED = tried('none', {}, .92, .98)


def chosen(module, *rows):
    table = module._table([UNDEFENDED, *rows])
    return list(table.loc[table['note'] != '', 'setting'])


def test_the_rule_counts_clean_accuracy_twice(module):
    assert chosen(module, tried('ft', {'lr': 1}, .91, .5), tried('ft', {'lr': 2}, .85, .3),
                  tried('ft', {'lr': 3}, .5, .0)) == ['lr 2']
    assert chosen(module, tried('ft', {'lr': 1}, .91, .5), tried('ft', {'lr': 2}, .85, .4)) == ['lr 1']


def test_settings_that_share_a_tuning_are_as_if_each_were_tuned(module):
    from invertune.tune import tune
    d, run = demo(), module._shared_tuning()
    case, bank = Case(d.bad, d.defender), Bank([random_perturbation('patch', 32)], [1.])
    made = [run(case, 0, bank, steps=2, lr=lr, alpha=a)[0].state_dict() for lr, a in ((1e-3, .5), (1e-3, .9), (2e-3, .5))]
    alone = tune(case, 0, bank, steps=2, lr=1e-3, alpha=.9)[0].state_dict()
    assert all(v.equal(alone[k]) for k, v in made[1].items())
    assert not all(v.equal(made[2][k]) for k, v in made[0].items())


def test_the_rule_asks_for_the_reading_up_to_the_clean_models(module):
    rows = tried('ft', {'lr': 1}, .91, .0, robust=.3), tried('ft', {'lr': 2}, .9, .0, robust=.8)
    assert chosen(module, *rows) == ['lr 2']
    assert chosen(module, *rows, tried('ft', {'lr': 3}, .89, .0, robust=.95)) == ['lr 2']


def test_a_value_at_the_edge_is_said(module):
    rows = [UNDEFENDED, *(tried('ft', {'lr': lr, 'epochs': n}, .91, asr) for lr, n,
                          asr in ((1, 1, .9), (2, 1, .5), (3, 1, .1), (1, 2, .9), (2, 2, .5), (3, 2, .2), (2, 3, .6)))]
    told = module._said(rows)
    assert 'chosen, at the edge of lr, epochs' in set(module._table(rows)['note']) and told[-1].startswith('At the edge of its grid: ft')
    inner = [UNDEFENDED, *(tried('ft', {'lr': lr}, .91, asr) for lr, asr in ((1, .5), (2, .1), (3, .3)))]
    assert module._said(inner)[-1] == 'No chosen value is at the edge of its grid.'


def test_means_are_over_the_attacks(module):
    rows = [UNDEFENDED, tried('none', {}, .92, .98, 'sig'),
            *(tried('ft', {'lr': lr}, .91, asr, a) for a, lr,
              asr in (('badnet', 1, .0), ('sig', 1, .8), ('badnet', 2, .3), ('sig', 2, .3)))]
    table = module._table(rows).set_index('setting')
    assert (table.loc['lr 1', 'asr'], table.loc['lr 1', 'asr_worst'], table.loc['lr 2', 'asr']) == (40, 80,
        30) and table.loc['lr 2', 'note'].startswith('chosen')


def test_every_defense_that_is_reported_has_a_grid_of_several_values():
    params = load_params()
    grids = params['selection']['grids']
    assert {d for d in params['main']['defenses'] if d != 'none'} <= {*grids} and params['selection']['seed'] not in [0,
        *params['seeds']['seeds']]
    assert all(len(values) >= 3 and values == sorted(values) for grid in grids.values() for values in grid.values())


def committed_choice():
    "Parameters by defense, as the committed table of the selection has them; {} before it was made."
    files = sorted((RESULTS/'glyphs'/'selection'/'rows').glob('*/rows.json'))
    return [row for file in files for row in json.loads(file.read_text())['rows']]


@pytest.mark.skipif(not committed_choice(), reason='the selection has not been run')
def test_what_was_chosen_is_what_is_used_and_at_no_edge(module):
    "The parameters of params.yaml are those that the committed rows choose."
    rows = committed_choice()
    means = module._means(rows)
    for defense, at in module._chosen(means).items():
        words = means.loc[at, 'setting']
        edges = set(module._edges(rows, defense, words)) - {'epochs'} # these end where a rival takes as long as we do
        assert not edges, f'{defense}: {words} is at the edge of its grid'
        setting = next(row['setting'] for row in rows if row['defense'] == defense and module._words(row['setting'])
                       == words)
        params = named_params('defenses', defense, 'glyphs')
        for name, value in (load_params()['selection']['fixed'][defense] | setting).items():
            place, *path = name.split('.')
            now = params.get(place)
            for part in path: now = (now or {}).get(part)
            assert now == value, f'{defense}: params.yaml has {name} {now}, the selection chose {value}'


# The zoo

def test_the_zoo_is_pinned_by_its_recipes():
    "A new attack, or another order of the registry, changes no group."
    params = load_params()['zoo']
    before = [zoo_group(n, params['recipes'], params['sizes']) for n in range(6)]
    @register_attack('tomorrow')
    def tomorrow(setup, **recipe): raise NotImplementedError
    try: assert [zoo_group(n, params['recipes'], params['sizes']) for n in range(6)] == before
    finally: del ATTACKS['tomorrow']
    assert load_params()['verdict']['recipes'] == params['recipes'] and set(params['recipes']) <= {*ATTACKS, 'tuned'}


def test_an_unknown_experiment_is_none():
    with pytest.raises(ModuleNotFoundError): of('rerun')
    assert not {'rerun', 'harder', 'structured', 'relearn', 'ablate', 'foreign'} & {p.stem[3:]
        for p in (NBS/'stages').glob('*.ipynb')}
