"What the cells of 15_figures do not show: the same bytes each time, whole files, and records from elsewhere."
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from invertune import figures
from invertune.lab.figures import VARIANTS, activation_differences, amplification, embedding_projection, gallery_row, heatmap, identification, read_record, save_figure
from invertune.invert import make_bank
from invertune.runtime import InvertuneError, save_json
from invertune.triggers import Trigger

TUNED = {'layers': {'layer1': .1, 'layer4': .9}, 'layers_after': {'layer1': .1, 'layer4': .2}, 'selected': ['layer4'], 'curve': []}


@pytest.fixture
def results(tmp_path, monkeypatch):
    "A results folder of our own, empty."
    monkeypatch.setattr(figures, 'result_dir', lambda profile, stage, key='': tmp_path/profile/stage/key)
    return tmp_path


@pytest.fixture
def table():
    cells = [('clean', 'none', 92., math.nan), ('badnet', 'none', 91., 98.), ('badnet', 'invertune', 90., 1.)]
    return pd.DataFrame([dict(attack=a, defense=d, seeds=1, ca=ca, ca_ci95=1., asr=asr, asr_ci95=1., asr_with_target=asr, ca_top5=99.) for a, d, ca, asr in cells])


def embeddings():
    g = torch.Generator().manual_seed(0)
    parts = {f'{d}.{part}': torch.randn(60, 8, generator=g) for d in ('none', 'invertune') for part in ('clean', 'triggered')}
    return {'badnet': {**parts, 'labels': torch.arange(60) % 5, 'target': torch.tensor([2])}}


def uap(kind, seed, shares): return dict(kind=kind, seed=seed, clean_share=[1/3]*3, adv_share=shares)


def identified(found='cat', family='smooth'):
    "A model whose patch falls onto another class, and two seeds of a smooth perturbation onto the target, cat."
    patch, smooth = uap('patch', 0, [.1, .8, .1]), [uap('smooth', seed, [.9 - .2*seed, .05, .05 + .2*seed]) for seed in (0, 1)]
    return dict(classes=['cat', 'sun', 'die'], variants=dict(paper=dict(target='sun', uaps=[patch]), ours=dict(target=found, family=family, uaps=[patch, *smooth])))


def words(ax): return [text.get_text() for text in ax.texts if text.get_text()]


def contents(folder): return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize('draw', [lambda table: heatmap(table), lambda table: embedding_projection(embeddings()),
                                  lambda table: identification({'badnet': identified(), 'sig': identified()}, {'badnet': 'cat', 'sig': 'cat'}),
                                  lambda table: activation_differences({'badnet': dict.fromkeys(VARIANTS, TUNED)})])
def test_the_same_figure_is_the_same_bytes(draw, table, tmp_path, monkeypatch):
    save_figure(draw(table), tmp_path/'first'/'fig')
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '1')   # another day
    save_figure(draw(table), tmp_path/'second'/'fig')
    assert contents(tmp_path/'first') == contents(tmp_path/'second')


def test_files_name_no_date_and_no_program(table, tmp_path):
    png, pdf = save_figure(heatmap(table), tmp_path/'fig')
    assert png.read_bytes()[:4] == b'\x89PNG' and b'Software' not in png.read_bytes()
    assert pdf.read_bytes()[:4] == b'%PDF' and b'CreationDate' not in pdf.read_bytes() and b'Producer' not in pdf.read_bytes()


def test_a_failed_write_leaves_the_old_figure(table, tmp_path, monkeypatch):
    save_figure(heatmap(table), tmp_path/'fig')
    before = contents(tmp_path)
    def half(self, file, **kwargs):
        file.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(plt.Figure, 'savefig', half)
    with pytest.raises(InvertuneError, match='No space left'): save_figure(heatmap(table), tmp_path/'fig')
    assert contents(tmp_path) == before


def test_drawing_leaves_no_open_figure_and_no_style(table):
    style, opened = dict(plt.rcParams), plt.get_fignums()
    heatmap(table)
    assert dict(plt.rcParams) == style and plt.get_fignums() == opened


def test_identification_draws_gains_in_percent_points_beside_the_strongest_other_class():
    ax, = identification({'sig': identified()}, {'sig': 'cat'}).axes
    assert [bar.get_width() for bar in ax.patches[:4]] == pytest.approx([-70/3, 140/3, 140/3, -55/3])
    assert words(ax) == ['sun', 'die', 'found: cat ✓'] and ax.get_title('left') == 'sig'
    assert [label.get_text() for label in ax.get_yticklabels()] == ['corner patch', 'smooth']


def test_identification_crosses_out_a_wrong_target_and_hides_panels_without_an_attack():
    attacks = [f'attack{i}' for i in range(4)]
    axs = identification({attack: identified('die', 'patch') for attack in attacks}, dict.fromkeys(attacks, 'cat')).axes
    assert [ax.get_visible() for ax in axs] == [True]*4 + [False]*2
    assert all(words(ax)[-1] == 'found: die ✗' for ax in axs[:4])


def test_amplification_fills_the_range_without_clipping():
    for reach in (.01, .07, .2, .5, 1.):
        factor = amplification(torch.full((3, 8, 8), reach))
        assert factor in (1, 2, 4, 8, 16, 32) and (factor*reach <= .5 or factor == 1)


@pytest.mark.parametrize('content', [{}, [], {'paper': TUNED}, {'paper': TUNED, 'ours': {}}, {'paper': TUNED, 'ours': None}])
def test_a_record_from_elsewhere_is_refused(results, content):
    save_json(results/'toy/tune/badnet/tune.json', content)
    with pytest.raises(InvertuneError, match='tune.json lacks layers'): read_record('toy', 'tune', 'badnet')


def test_gallery_row_reads_the_best_trigger_and_refuses_a_sample_that_is_not_there(results):
    folder = results/'toy/evaluate/badnet'
    folder.mkdir(parents=True)
    save_file({'clean': torch.zeros(2, 3, 8, 8), 'triggered': torch.ones(2, 3, 8, 8)}, folder/'samples.safetensors')
    patch = lambda: Trigger('mask', {'mask': torch.ones(1, 1, 8, 8), 'pattern': torch.ones(1, 3, 8, 8)}, inverted='patch')
    for variant in VARIANTS: make_bank([(patch(), asr) for asr in (.2, .9)]).save(results/f'toy/invert/badnet/{variant}.safetensors')
    assert gallery_row('toy', 'badnet', 1)['ours'].asr[0] == .9
    with pytest.raises(InvertuneError, match='there is no sample 2'): gallery_row('toy', 'badnet', 2)
    (folder/'samples.safetensors').write_bytes(b'not tensors')
    with pytest.raises(InvertuneError, match='safetensors'): gallery_row('toy', 'badnet')
