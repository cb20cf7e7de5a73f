"What the cells of the tables' notebook do not show: files on disk, intervals worked out by hand, the command line, a page."
import math
import subprocess
import sys

import pandas as pd
import pytest

from invertune.lab import tables
from invertune.lab.tables import (RECALLS, Experiment, _COLUMNS, _STEADY, _to_csv, _to_latex, _write_table,
                                  evaluated_rows, is_lost, mean_sentences, mean_table, read_rows, rows_table, student,
                                  to_markdown, wilson, write_report)
from invertune.runtime import InvertuneError, save_json


def row(attack, defense, ca=.9, asr=.95, seed=0, **changes):
    rates = dict(ca=ca, asr=asr, robust=.5, robust_clean=.9, asr_any=asr, asr_with_target=asr, ca_top5=.99,
                 ca_clean=.92, **{recall: .5 for recall in RECALLS})
    told = dict(target='anchor', found=None, inverted_asr=None, failed=None, any_class='sun', n=1000, n_non_target=960)
    return {'attack': attack, 'defense': defense, 'seed': seed, **told, **rates, **changes}


NOTHING = dict.fromkeys(('target', 'asr', 'robust', 'robust_clean', 'asr_any', 'any_class', 'asr_with_target',
                         'n_non_target'))
CLEAN = row('clean', 'none', .92, **{k: v for k, v in NOTHING.items() if k != 'asr'}) | dict(asr=None)
ROWS = [CLEAN, row('badnet', 'none'), row('badnet', 'invertune', .89, .01), row('sig', 'none'),
        row('sig', 'invertune', .9, .03)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    "A results folder of our own, empty."
    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    monkeypatch.setattr(tables, 'result_dir', lambda profile, stage,
                        *key: tmp_path.joinpath(profile, stage, *map(str, key)))
    return tmp_path


@pytest.fixture
def evaluated(results):
    "A complete evaluation of two attacks."
    save_json(results/'toy/train/0/metrics.json', {'rows': [CLEAN]})
    for attack in ('badnet', 'sig'): save_json(results/f'toy/evaluate/0/{attack}/rows.json',
                                               {'rows': [r for r in ROWS if r['attack'] == attack]})
    return results


def test_columns_are_exactly_the_promised_ones():
    assert list(rows_table(ROWS).columns) == _COLUMNS
    assert _to_csv(rows_table(ROWS)).splitlines()[0].startswith('attack,defense,seeds,ca,ca_low,ca_high,asr,asr_low,asr_high,robust,robust_clean,asr_any,any_class')


def test_rows_stand_in_the_order_of_the_registries_whatever_order_they_come_in():
    shuffled = rows_table(ROWS[::-1])
    assert list(zip(shuffled['attack'], shuffled['defense'])) == [('clean', 'none'), ('all', 'none'),
        ('all', 'invertune'), ('badnet', 'none'),
                                                                 ('badnet', 'invertune'), ('sig', 'none'),
                                                                     ('sig', 'invertune')]


@pytest.mark.parametrize('hits, n, low, high',
                         [(0, 10, 0., .27754), (5, 10, .23659, .76341), (10, 10, .72246, 1.),
                          (81, 263, .25527, .36622)])
def test_wilson_by_hand(hits, n, low, high):
    "The last case is the worked example of Newcombe (1998), Statistics in Medicine 17, table I, method 3."
    assert wilson(hits/n, n) == pytest.approx((low, high), abs=2e-5)


def test_student_by_hand():
    ".90, .92, .94: s = .02, t(.975, 2) = 4.30265, half width 4.30265 * .02 / sqrt(3); two seeds have no interval."
    low, high = student([.90, .92, .94])
    assert ((high - low)/2, (high + low)/2) == pytest.approx((.0496827, .92), abs=1e-6)
    assert all(map(math.isnan, student([.9, .92])))


@pytest.mark.parametrize('values', [[0., 0., .4], [1., .6, 1.], [0., 0., 0.], [1., 1., 1.], [.5, 0., 1.]])
def test_no_interval_leaves_the_range_of_a_rate(values):
    "18 of 60 did, once: symmetric intervals of rates near their bound."
    low, high = student(values)
    assert 0 <= low <= sum(values)/3 <= high <= 1
    made = rows_table([row('badnet', d, asr=v, ca=.92, seed=s) for s, v in enumerate(values) for d in ('none', 'ft')])
    assert made[['ca_low', 'asr_low']].min(axis=None) >= 0 and made[['ca_high', 'asr_high']].max(axis=None) <= 100


def test_the_interval_of_a_mean_is_over_seeds_and_not_over_attacks():
    "Two attacks far apart, three seeds alike: the mean over the attacks is as sure as the seeds are."
    rows = [row(a, 'none', asr=v, seed=s) for s in range(3) for a, v in (('badnet', .2), ('sig', .8))]
    line = rows_table(rows).iloc[0]
    assert (line['asr'], line['asr_low'], line['asr_high']) == (50, 50, 50)


@pytest.mark.parametrize('ca, lost', [(.459, True), (.461, False), (0., True)])
def test_lost_is_under_half_of_the_clean_model(ca, lost): assert is_lost(row('sig', 'ft', ca)) == lost


def test_a_lost_model_is_marked_and_in_no_mean():
    "A destroyed model has the best ASR of all, and must not lower the mean."
    rows = ROWS + [row('badnet', 'ft', .9, .5), row('sig', 'ft', .1, 0.)]
    table = rows_table(rows).set_index(['attack', 'defense'])
    assert table.loc[('sig', 'ft'), 'note'] == 'lost' and table.loc[('all', 'ft'), 'note'] == 'lost 1 of 2'
    assert (table.loc[('all', 'ft'), 'asr'], table.loc[('all', 'ft'), 'ca']) == (50, 90)
    means = mean_table(rows).set_index('defense')
    assert (means.loc['ft', 'asr'], means.loc['ft', 'lost'], means.loc['ft', 'runs'], means.loc['ft', 'worst']) == (50,
        1, 2, 'badnet')
    every = rows_table([row('sig', 'none'), row('sig', 'ft', .1, 0.)]).iloc[1]
    assert (every['asr'], every['note']) == (0, 'lost')                    # nothing else to show, and marked


def test_a_failed_run_says_so_and_counts():
    "The model is as it was received, so its ASR is the defender's."
    rows = ROWS + [row('badnet', 'invertune-paper', failed='under its gate'), row('sig', 'invertune-paper', .9, .05)]
    means = mean_table(rows).set_index('defense')
    assert means.loc['invertune-paper', 'asr'] == 50 and means.loc['invertune-paper', 'failed'] == 1
    assert 'invertune-paper | 1 | ' in to_markdown(rows_table(rows)) and '| failed |' in to_markdown(rows_table(rows))
    assert any('1 failed' in sentence for sentence in mean_sentences(rows))


def test_labels_are_counted_and_a_given_one_is_no_merit():
    rows = ROWS[:4] + [row('sig', 'invertune', found='anchor'), row('badnet', 'invertune-paper-given', found='anchor'),
                       row('sig', 'invertune-paper-given', found='anchor')]
    rows[2] = rows[2] | dict(found='sun')
    means = mean_table(rows).set_index('defense')
    assert dict(means['named']) == {'none': '', 'invertune-paper-given': 'given', 'invertune': '1 of 2'}
    assert 'invertune-paper, label given' in to_markdown(means.reset_index()) and 'invertune-paper-given' in _to_csv(means.reset_index())


@pytest.mark.parametrize('change, words',
                         [({'asr': 95.}, 'not a fraction'), ({'ca': None}, 'not a fraction'),
                          ({'robust': None}, 'not a fraction'),
                                           ({'ca': True}, 'not a fraction'), ({'ca': '0.9'}, 'not a fraction'),
                          ({'robust_clean': math.nan}, 'not a fraction')])
def test_a_rate_that_is_none_is_refused(results, change, words):
    (results/'rows.json').write_text(__import__('json').dumps({'rows': [row('badnet', 'none') | change]}))
    with pytest.raises(InvertuneError, match=words): read_rows(results/'rows.json')


@pytest.mark.parametrize('content', [{}, [], {'rows': []}, {'rows': [1]}, {'rows': [{'attack': 'badnet'}]}])
def test_a_foreign_file_is_refused(results, content):
    save_json(results/'rows.json', content)
    with pytest.raises(InvertuneError, match='rows.json is not an evaluation of ours'): read_rows(results/'rows.json')


def test_collects_what_is_expected_and_names_what_is_missing(evaluated):
    assert evaluated_rows('toy', [0], ['sig', 'badnet'], ['invertune', 'none']) == ROWS
    with pytest.raises(InvertuneError, match=r'lacks 2 of 5 expected rows: badnet, ft; sig, ft'): evaluated_rows('toy',
        [0], ['badnet', 'sig'], ['none', 'ft'])
    with pytest.raises(InvertuneError, match='wanet.*is missing'): evaluated_rows('toy', [0], ['wanet'], ['none'])


def test_a_damaged_file_is_one_sentence(evaluated):
    (evaluated/'toy/evaluate/0/sig/rows.json').write_text('{"rows": [')
    with pytest.raises(InvertuneError, match='damaged'): evaluated_rows('toy', [0], ['sig'], ['none'])


def test_every_seed_has_its_clean_model_and_a_wrong_seed_is_refused(evaluated):
    save_json(evaluated/'toy/train/1/metrics.json', {'rows': [CLEAN | dict(seed=1, ca=.93)]})
    save_json(evaluated/'toy/evaluate/1/badnet/rows.json', {'rows': [row('badnet', 'none', ca=.91, seed=1)]})
    rows = evaluated_rows('toy', [0, 1], ['badnet'], ['none'])
    table = rows_table(rows)
    assert [r['seed'] for r in rows] == [0, 0, 1, 1] and list(table['seeds']) == [2, 2,
        2] and table['ca'].tolist() == [92.5, 90.5, 90.5]
    save_json(evaluated/'toy/evaluate/1/badnet/rows.json', {'rows': [row('badnet', 'none', seed=0)]})
    with pytest.raises(InvertuneError, match='a file of seed 1 holds rows of seed 0'): evaluated_rows('toy', [0, 1],
        ['badnet'], ['none'])
    with pytest.raises(InvertuneError, match='train.2.*is missing'): evaluated_rows('toy', [2], ['badnet'], ['none'])


def test_the_three_files_hold_the_same_cells(tmp_path):
    table = rows_table(ROWS)
    csv, md, tex = _write_table(table, tmp_path/'deep'/'table')
    back = pd.read_csv(csv, dtype={'any_class': str, 'note': str}, keep_default_na=False,
                       na_values={c: [''] for c in table.columns if c not in ('any_class', 'note')})
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert '| clean | none | 1 | 92.00 [90.15, 93.53] | – | – |' in md.read_text()
    assert r'clean & none & 1 & 92.00 [90.15, 93.53] & -- & -- &' in tex.read_text() == _to_latex(table)


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    _write_table(rows_table(ROWS), tmp_path/'table')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(tables.Path, 'write_text', full)
    with pytest.raises(InvertuneError, match='No space left'): _write_table(rows_table(ROWS[:3]), tmp_path/'table')
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_summary_needs_the_undefended_model():
    with pytest.raises(InvertuneError, match="'none' is missing for sig 0"): mean_table(ROWS[:3] + ROWS[4:])


def test_check_counts_the_steady_rows_and_the_order(evaluated, monkeypatch, capsys):
    table = rows_table(ROWS + [row('badnet', 'ft', asr=.4), row('sig', 'ft', asr=.2)])
    ft = table['defense'] == 'ft'
    def said(rerun, *words):
        _write_table(rerun, evaluated/'toy/main/table')
        return tables._main(['check', '--profile', 'toy', *words]), capsys.readouterr().out
    monkeypatch.setattr(tables, '_committed_table', lambda *args: table)
    moved = table.assign(asr=(table['asr'] - 10).where(~ft, table['asr']))
    status, text = said(moved)
    assert _STEADY == ('none',
                      'invertune') and status == 1 and 'differs from HEAD in cells (6) of none and invertune' in text and '| ft |' not in text
    status, text = said(moved, '--asr', '11')
    assert status == 0 and 'agrees with HEAD in every cell of none and invertune' in text
    status, text = said(table.assign(asr=(table['asr'] - 15).where(ft, table['asr'])))
    assert status == 0 and text.count('| ft |') == 3 and 'not counted' in text            # 25 and 5 %, still above 1 and 3 %
    status, text = said(table.assign(asr=table['asr'].where(~ft, 0.)))
    assert status == 1 and 'leaves less of the backdoors than ft; here it does not' in text
    assert said(table[~ft])[0] == 1                                                       # rows that are gone
    status, text = said(table.assign(robust=table['robust'] - 6))
    assert status == 1 and '| robust |' in text


@pytest.mark.parametrize('text', ['', 'a,b\n1,2\n', 'defense,ca,asr\nnone,high,1\n', 'defense,ca,asr\n,1,1\n'])
def test_a_file_that_is_no_table_is_refused(evaluated, text, monkeypatch, capsys):
    monkeypatch.setattr(tables, '_committed_table', lambda *args: rows_table(ROWS))
    (evaluated/'toy/main').mkdir(parents=True)
    (evaluated/'toy/main/table.csv').write_text(text)
    assert tables._main(['check', '--profile', 'toy']) == 1 and 'table.csv is not a table' in capsys.readouterr().out


def test_the_command_is_one_sentence_where_nothing_was_committed():
    done = subprocess.run([sys.executable, '-m', 'invertune.lab.tables', 'check', '--profile', 'no-such-profile'],
                          capture_output=True, text=True)
    assert done.returncode == 1 and 'no-such-profile' in done.stdout and 'Traceback' not in done.stderr


def test_a_report_is_a_page(results):
    "Question, table, figure, sentences, other tables, command and cost, in this order; every link leads to a file."
    import matplotlib.pyplot as plt
    toy = Experiment('main', 'Is it gone?', lambda profile: ROWS, {'table': mean_table, 'rows': rows_table},
                     {'figure': lambda rows: plt.figure(), 'other': lambda rows: plt.figure()},
                     mean_sentences, costs=('defend/*/cost.json',))
    save_json(results/'toy/defend/a/cost.json', dict(seconds=90., peak_mb=2048))
    write_report(toy, 'toy')
    folder, text = results/'toy/main', (results/'toy/main/README.md').read_text()
    places = [text.index(words)
              for words in ('# main', '**Is it gone?**', '| Defence |', '](figure.png)', '- Undefended', '## Rows',
                            '](other.png)', '`make main`', '1 run, 2 minutes')]
    assert places == sorted(places)
    assert {f.name for f in folder.iterdir()} == {'README.md', 'metrics.json',
                                                  *(f'{n}.{s}' for n in ('table', 'rows_table')
                                                    for s in ('csv', 'md', 'tex')),
                                                 *(f'{n}.{s}' for n in ('figure', 'other') for s in ('png', 'pdf'))}
