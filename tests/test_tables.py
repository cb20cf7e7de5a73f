"What the cells of 14_tables do not show: files on disk, intervals worked out by hand, the command line."
import math, subprocess, sys

import pandas as pd
import pytest

from invertune import tables
from invertune.runtime import InvertuneError, save_json
from invertune.lab.tables import (COLUMNS, RECALLS, check_row, collect_found, collect_rows, collect_seed_rows, compare_tables, cost_table, found_table, half_width, main_table, 
                              parse_table, read_table, student_half, summary_table, to_csv, to_latex, to_markdown, wilson, write_table)


def row(attack, defense, ca=.9, asr=.95, seed=0, **changes):
    counts = dict(n=1000, n_non_target=960, target='anchor', ca_top5=.99, **{recall: .5 for recall in RECALLS})
    return {**counts, 'attack': attack, 'defense': defense, 'seed': seed, 'ca': ca, 'asr': asr, 'asr_with_target': asr, **changes}


CLEAN = row('clean', 'none', .92, None, n_non_target=None, target=None)
ROWS = [CLEAN, row('badnet', 'none'), row('badnet', 'invertune', .89, .01), row('sig', 'none'), row('sig', 'invertune', .9, .03)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    "A results folder of our own, empty."
    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    monkeypatch.setattr(tables, 'result_dir', lambda profile, stage, key='': tmp_path/profile/stage/key)
    return tmp_path


@pytest.fixture
def evaluated(results):
    "A complete evaluation of two attacks."
    save_json(results/'toy/train/clean/metrics.json', {'rows': [CLEAN]})
    for attack in ('badnet', 'sig'): save_json(results/f'toy/evaluate/{attack}/metrics.json', {'rows': [r for r in ROWS if r['attack'] == attack]})
    return results


def test_columns_are_exactly_the_promised_ones():
    assert to_csv(main_table(ROWS)).splitlines()[0] == 'attack,defense,seeds,ca,ca_ci95,asr,asr_ci95,asr_with_target,ca_top5'


def test_rows_stand_in_the_order_of_the_paper_whatever_order_they_come_in():
    shuffled = main_table(ROWS[::-1])
    assert list(zip(shuffled['attack'], shuffled['defense'])) == [(r['attack'], r['defense']) for r in (ROWS[0], ROWS[1], ROWS[2], ROWS[3], ROWS[4])]


@pytest.mark.parametrize('hits, n, low, high', [(0, 10, 0., .27754), (5, 10, .23659, .76341), (10, 10, .72246, 1.), (81, 263, .25527, .36622)])
def test_wilson_by_hand(hits, n, low, high):
    "The last case is the worked example of Newcombe (1998), Statistics in Medicine 17, table I, method 3."
    assert wilson(hits/n, n) == pytest.approx((low, high), abs=2e-5)


def test_student_by_hand():
    "90, 92, 94: s = 2, t(.975, 2) = 4.30265, half width 4.30265 * 2 / sqrt(3)."
    assert student_half([90, 92, 94]) == pytest.approx(4.96827, abs=1e-4)
    assert student_half([90, 92]) == pytest.approx(12.7062, abs=1e-3)     # s = sqrt(2), t(.975, 1) = 12.7062


def test_one_seed_uses_images_and_more_use_seeds():
    assert half_width([.5], [100]) == pytest.approx(.09617, abs=1e-5)
    assert half_width([.5, .5, .5], [100]*3) == 0
    assert math.isnan(half_width([None, .5], [100, 100]))


@pytest.mark.parametrize('change, words', [({'asr': 95.}, 'not a fraction'), ({'ca': None}, 'not a fraction'), ({'asr': None}, 'not a fraction'),
                                           ({'ca': True}, 'not a fraction'), ({'ca': '0.9'}, 'not a fraction'), ({'ca': math.nan}, 'not a fraction')])
def test_a_rate_that_is_none_is_refused(change, words):
    with pytest.raises(InvertuneError, match=words): check_row({**row('badnet', 'none'), **change}, 'metrics.json')


@pytest.mark.parametrize('content', [{}, [], {'rows': []}, {'rows': [1]}, {'rows': [{'attack': 'badnet'}]}])
def test_a_foreign_file_is_refused(results, content):
    save_json(results/'metrics.json', content)
    with pytest.raises(InvertuneError, match='metrics.json is not an evaluation of ours'): tables.read_rows(results/'metrics.json')


def test_collects_what_is_expected_and_names_what_is_missing(evaluated):
    assert collect_rows('toy', ['sig', 'badnet'], ['invertune', 'none']) == ROWS
    with pytest.raises(InvertuneError, match=r'lacks 2 of 5 expected rows: badnet, ft; sig, ft'): collect_rows('toy', ['badnet', 'sig'], ['none', 'ft'])
    with pytest.raises(InvertuneError, match='wanet.*is missing'): collect_rows('toy', ['wanet'], ['none'])


def test_a_damaged_file_is_one_sentence(evaluated):
    (evaluated/'toy/evaluate/sig/metrics.json').write_text('{"rows": [')
    with pytest.raises(InvertuneError, match='damaged'): collect_rows('toy', ['sig'], ['none'])


def test_seeds_are_collected_and_a_file_under_a_wrong_seed_is_refused(evaluated):
    "The main run and one rerun; the clean model is one and the same."
    rerun = evaluated/'toy/rerun/badnet-1/metrics.json'
    save_json(rerun, {'rows': [row('badnet', 'none', ca=.91, seed=1)]})
    table = main_table(collect_seed_rows('toy', ['badnet'], ['none'], 0, [1]))
    assert list(table['seeds']) == [1, 2] and table['ca'].tolist() == [92., 90.5]
    assert table['ca_ci95'].tolist() == [pytest.approx(1.69, abs=.01), pytest.approx(6.35, abs=.01)]   # the second: 12.706 * .7071 / 1.4142
    with pytest.raises(InvertuneError, match='lacks 1 of 3 expected rows: badnet, invertune'): collect_seed_rows('toy', ['badnet'], ['none', 'invertune'], 0, [1])
    save_json(rerun, {'rows': [row('badnet', 'none', seed=0)]})
    with pytest.raises(InvertuneError, match='a file of seed 1 holds rows of seed 0'): collect_seed_rows('toy', ['badnet'], ['none'], 0, [1])
    with pytest.raises(InvertuneError, match='rerun.badnet-2.*is missing'): collect_seed_rows('toy', ['badnet'], ['none'], 0, [2])


def test_named_targets(evaluated):
    "Of the main run from its own files, of a rerun from its rows; only a defense that names a target is counted."
    said = {'variants': {'paper': {'target': 'sun'}, 'ours': {'target': 'anchor'}}}
    save_json(evaluated/'toy/identify/badnet/identify.json', said)
    save_json(evaluated/'toy/rerun/badnet-1/metrics.json', {'rows': [row('badnet', 'none', seed=1, found=None), row('badnet', 'invertune', seed=1, found='die')]})
    table = found_table(collect_found('toy', ['badnet'], 0, [1]))
    assert table.values.tolist() == [['invertune-paper', 1, 0, 'badnet 0 (sun)'], ['invertune', 2, 1, 'badnet 1 (die)']]


def test_cost_is_read_from_both_places(results):
    save_json(results/'toy/baseline/badnet-ft/cost.json', {'seconds': 30.25, 'peak_mb': 700})
    save_json(results/'toy/tune/badnet/cost.json', {'paper': {'seconds': 40, 'peak_mb': 800}, 'ours': {'seconds': 70, 'peak_mb': 900}})
    table = cost_table('toy', ['badnet'], ['none', 'invertune', 'invertune-paper', 'ft'])
    assert table['defense'].tolist() == ['ft', 'invertune-paper', 'invertune'] and table['seconds'].tolist() == [30.2, 40, 70]
    save_json(results/'toy/tune/badnet/cost.json', {'paper': {'seconds': 40, 'peak_mb': 800}})
    with pytest.raises(InvertuneError, match='does not say the seconds and peak_mb of invertune'): cost_table('toy', ['badnet'], ['invertune'])


def test_the_three_files_hold_the_same_cells(tmp_path):
    table = main_table(ROWS)
    for file in write_table(table, tmp_path/'deep'/'main_table'): assert file.read_text().count('95.00') == 4
    pd.testing.assert_frame_equal(read_table(tmp_path/'deep/main_table.csv'), table)
    assert '| clean | none | 1 | 92.00 | 1.69 | – | – | – | 99.00 |' in to_markdown(table)
    assert r'clean & none & 1 & 92.00 & 1.69 & -- & -- & -- & 99.00 \\' in to_latex(table)


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    write_table(main_table(ROWS), tmp_path/'main_table')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(tables.Path, 'write_text', full)
    with pytest.raises(InvertuneError, match='No space left'): write_table(main_table(ROWS[:3]), tmp_path/'main_table')
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize('text', ['', 'a,b\n1,2\n', ','.join(COLUMNS) + '\nbadnet,none,1,high,1,1,1,1,1\n', ','.join(COLUMNS) + '\n,,,,,,,,\n'])
def test_a_file_that_is_no_table_is_refused(text):
    with pytest.raises(InvertuneError, match='foreign.csv is not a'): parse_table(text, 'foreign.csv')


def test_comparison_names_cells_and_rows():
    table = main_table(ROWS)
    moved = table.copy()
    moved.loc[2, 'asr'] += 5.01
    moved.loc[3, 'ca'] -= 2.5                                 # within the tolerance, to the hundredth
    found = compare_tables(table, moved)
    assert found[['attack', 'defense', 'column', 'difference']].values.tolist() == [['badnet', 'invertune', 'asr', 5.01]]
    assert len(compare_tables(table, table.iloc[:-1])) == 4   # a row that is gone: each of its rates
    assert compare_tables(table, moved, {'asr': 6}).empty


def test_summary_needs_the_undefended_model():
    with pytest.raises(InvertuneError, match="'none' is missing for sig"): summary_table(main_table(ROWS[:3] + ROWS[4:]))


def test_check_counts_the_steady_rows_and_the_order(evaluated, monkeypatch, capsys):
    table = main_table(ROWS + [row('badnet', 'ft', asr=.4), row('sig', 'ft', asr=.2)])
    ft = table['defense'] == 'ft'
    def said(rerun, *words):
        write_table(rerun, evaluated/'toy/main_table')
        return tables.main(['check', '--profile', 'toy', *words]), capsys.readouterr().out
    monkeypatch.setattr(tables, 'committed_table', lambda *args: table)
    moved = table.assign(asr=(table['asr'] - 10).where(~ft, table['asr']))
    status, text = said(moved)
    assert status == 1 and 'differs from HEAD in cells (4) of none and invertune' in text and '| ft |' not in text
    status, text = said(moved, '--asr', '11')
    assert status == 0 and 'agrees with HEAD in every cell of none and invertune' in text
    status, text = said(table.assign(asr=(table['asr'] - 15).where(ft, table['asr'])))
    assert status == 0 and text.count('| ft |') == 2 and 'not counted' in text            # 25 and 5 %, still above 1 and 3 %
    status, text = said(table.assign(asr=table['asr'].where(~ft, 0.)))
    assert status == 1 and 'leaves less of the backdoors than ft; here it does not' in text
    assert said(table[~ft])[0] == 1                                                       # rows that are gone


def test_the_command_is_one_sentence_where_nothing_was_committed():
    done = subprocess.run([sys.executable, '-m', 'invertune.lab.tables', 'check', '--profile', 'no-such-profile'], capture_output=True, text=True)
    assert done.returncode == 1 and 'no-such-profile' in done.stdout and 'Traceback' not in done.stderr
