"What the notebooks' cells do not show of the figures: the same bytes each time, letters that can be read, colours that stay, lost models that are not winners."
import importlib
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from invertune.defenses import DEFENSES
from invertune.invert import Bank
from invertune.lab import main, seeds, style
from invertune.lab.style import LOST, SMALL, WIDTH, legend, look, save_figure
from invertune.lab.profiles import EXPERIMENTS
from invertune.lab.tables import RECALLS
from invertune.runtime import InvertuneError
from invertune.triggers import Trigger

ATTACKS, NAMES = ['badnet', 'sig', 'wanet'], ['none', 'ft', 'invertune-paper', 'invertune']
LEFT = {'none': .97, 'ft': .4, 'invertune-paper': .6, 'invertune': .02}


def row(attack, defense, seed=0, **changes):
    "wanet x invertune-paper is destroyed, sig x invertune-paper has failed."
    lost, failed = (attack, defense) == ('wanet', 'invertune-paper'), (attack, defense) == ('sig', 'invertune-paper')
    asr = 0. if lost else LEFT[defense] - .01*(seed % 3)
    rates = dict(ca=.1 if lost else .91 - .01*NAMES.index(defense), asr=asr, robust=0. if lost else .9*(1 - asr),
                 robust_clean=.9, asr_any=asr, asr_with_target=asr,
                 ca_top5=.99, ca_clean=.92, **dict.fromkeys(RECALLS, .5))
    return dict(attack=attack, defense=defense, seed=seed, target='cat',
                found=None if defense in ('none', 'ft') else 'cat', inverted_asr=.9, trigger=0,
                failed='It failed.' if failed else None, any_class='sun', n=3200, n_non_target=3100) | rates | changes


def clean(seed=0): return row('badnet', 'none', seed, target=None,
                              ca=.92) | dict(attack='clean') | dict.fromkeys(('asr', 'robust', 'robust_clean',
                                  'asr_any', 'any_class', 'asr_with_target'))


def grid(seed=0): return [row(a, d, seed) for a in ATTACKS for d in NAMES]


def uap(family, seed, shares): return dict(family=family, seed=seed, clean_share=[1/3]*3, adv_share=shares)


LAYERS = {'layers': {'layer1': .1, 'layer4': .9}, 'layers_after': {'layer1': .1, 'layer4': .2}, 'selected': ['layer4']}


def reports(found='cat', family='smooth'):
    "A model whose patch falls onto another class, and two seeds of a smooth perturbation onto the target, cat."
    patch, smooth = uap('patch', 0, [.1, .8, .1]), [uap('smooth', seed, [.9 - .2*seed, .05, .05 + .2*seed])
                                                    for seed in (0, 1)]
    return {'invertune': dict(target=found, tuning=LAYERS,
                              identification=dict(family=family, classes=['cat', 'sun', 'die'],
                                                  simulations=[patch, *smooth])),
            'invertune-paper': dict(target='sun', tuning={}, identification=dict(family='patch', simulations=[patch]))}


def embeddings():
    g = torch.Generator().manual_seed(0)
    parts = {f'{d}.{part}': torch.randn(60, 8, generator=g) for d in ('none', 'invertune')
             for part in ('clean', 'triggered')}
    return {**parts, 'labels': torch.arange(60) % 5, 'target': torch.tensor([2])}


def gallery():
    patch = lambda value: Trigger('mask', {'mask': torch.ones(1, 1, 8, 8), 'pattern': torch.full((1, 3, 8, 8), value)},
                                  family='patch')
    return dict(clean=torch.zeros(3, 8, 8), triggered=torch.full((3, 8, 8), .1)) | {'invertune-paper': Bank([], []),
        'invertune': Bank([patch(.2)], [.9])}


def shot():
    read = {'read before': [('cat', .9), ('sun', .1), ('die', 0.)], 'read after': [('sun', .7), ('cat', .2), ('die', .1)]}
    return dict(images={name: torch.zeros(3, 8, 8) for name in ('clean', 'trigger', 'rebuilt')}, target='cat', read=read)


def curve(high, ca=.9): return [dict(step=s, asr=high*s/300, ca=ca, robust=.5) for s in (0, 10, 100, 300)]


DATA = dict(
    main=dict(rows=[clean(), *grid()], truth=dict.fromkeys(ATTACKS, 'cat'), reports={a: reports() for a in ATTACKS},
              gallery={a: gallery() for a in ATTACKS}, shot=shot(),
              embeddings={a: embeddings() for a in ATTACKS},
              costs={(a, d): dict(seconds=1., peak_mb=1.) for a in ATTACKS for d in NAMES[1:]}),
    seeds=[r for s in (11, 12, 13) for r in [clean(s), *grid(s)]],
    selection=[r | dict(setting={} if r['defense'] == 'none' else {'lr': lr}, ca=r['ca'] - 10*lr,
                        asr=max(0., r['asr'] - 30*lr)) for r in grid()
               for lr in ((0,) if r['defense'] == 'none' else (1e-3, 3e-3, 1e-2))],
    durability=[dict(attack=a, defense=d, lr=1e-4, pairs=p, seed=s, ca_clean=.92,
                     curve=curve(h, .1 if (a, d) == ('wanet', 'invertune-paper') else .9))
                for a in ATTACKS for p in ('all classes', 'without the target') for s in (0, 1, 2) for d,
                h in (('clean', .01), *LEFT.items())],
    unseen=dict(rows=[r | dict(kind=r['attack'], images=0, took=True,
                               side='held out' if r['attack'] == 'sig' else 'development') for r in grid()], missing=0,
                pictures={name: torch.zeros(3, 8, 8, dtype=torch.uint8) for name in ('as it was', *ATTACKS)}),
    rates=[row(a, n, share=s, poisons=round(6000*s), score=4*s**.3, alarm=s > .01, asr=min(1., 6*s**.5) if n == 'none' else .01)
           for a in ATTACKS for s in (.003, .05, .2) for n in ('none', 'invertune')],
    adaptive=[row(a, n, attacker=who, gap=.5, score=1.6 if n == 'invertune' else None, asr=s,
                  ca=.1 if (who, n) == ('evading', 'invertune-paper') else .9)
              for who in ('aligned', 'evading', 'anchored') for a in ('badnet', 'wanet') for n, s in LEFT.items()],
    ablations=dict(rows=[row(a, 'invertune', variant=v, asr=s, ca=.1 if (a, v) == ('sig', 'no margin') else .9)
                         for a in ATTACKS for v, s in (('undefended', .9), ('whole', .02), ('no margin', .1))],
                   truth=dict.fromkeys(ATTACKS, 'cat'), identified={}),
    scarce=[row(a, d, images=n, asr=20/n if n else .9, ca=.1 if (a, n) == ('sig', 64) else .9) for a in ATTACKS
            for d, sizes in (('none', [0]), ('ft', (64, 256, 1000)), ('invertune', (64, 256, 1000))) for n in sizes],
    domains=[row(a, 'invertune', images=k, asr=s, ca=.1 if (a, k) == ('sig', 'photos') else .9) for a in ATTACKS for k,
             s in (('none', .9), ('own', .01), ('photos', .1))],
    verdict=dict(rows=[dict(group=g, tower=t, name=n, score=s, alarm=s > 1, threshold=1, backdoored=n == 'sig',
                            target=None, found=None, ca=.9, asr=.9 if n == 'sig' else None)
                       for g, t in enumerate(('resnet', 'vit')) for n,
                       s in (('clean', .3+.3*g), ('tuned', .5+.2*g), ('sig', 3-2.3*g))],
                 harm=[dict(drop=0.)], costs=[dict(classes=c, identify=9., per_class=c/2) for c in (32, 1000)]),
    scale=[row(a, 'none', profile=p, side=s, parameters=n, score=.6 if d == 'clean' else 3., alarm=d != 'clean', removed=True,
               asr=.9 if d == 'none' else .02) | dict(defense=d)
           for p, s, n in (('small', 32, 4e5), ('medium', 112, 7e6)) for a in ATTACKS for d in ('clean', 'none', 'invertune')])
FIGURES = [(word, name) for word in EXPERIMENTS
           for name in getattr(importlib.import_module(f'invertune.lab.{word}'), word).figures]


def draw(word, name): return getattr(importlib.import_module(f'invertune.lab.{word}'), word).figures[name](DATA[word])


def words(fig): return [text for text in fig.findobj(plt.Text) if text.get_text() and text.get_visible()]


def contents(folder): return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_experiment_has_one_main_figure():
    assert [word for word, name in FIGURES if name == 'figure'] == EXPERIMENTS
    assert {name for word, name in FIGURES if word == 'main'} == {'figure', 'strip', 'gallery', 'identification',
        'activation_differences', 'embedding_projection'}


@pytest.mark.parametrize('word, name', FIGURES)
def test_letters_can_be_read_and_the_page_is_wide_enough(word, name):
    fig = draw(word, name)
    assert words(fig) and min(text.get_fontsize() for text in words(fig)) >= SMALL and fig.get_figwidth() <= WIDTH
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*constrained_layout.*')    # a layout that was given up
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
    box = fig.get_tightbbox(canvas.get_renderer())                            # inches
    assert box.x0 > -.05 and box.x1 < fig.get_figwidth() + .05 and box.y0 > -.05 and box.y1 < fig.get_figheight() + .05


@pytest.mark.parametrize('word, name', FIGURES)
def test_the_same_figure_is_the_same_bytes(word, name, tmp_path, monkeypatch):
    save_figure(draw(word, name), tmp_path/'first'/'fig')
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '1')   # another day
    save_figure(draw(word, name), tmp_path/'second'/'fig')
    assert contents(tmp_path/'first') == contents(tmp_path/'second')


def test_drawing_leaves_no_open_figure_and_no_style():
    before, opened = dict(plt.rcParams), plt.get_fignums()
    for word, name in FIGURES: draw(word, name)
    assert dict(plt.rcParams) == before and plt.get_fignums() == opened


def test_a_defense_has_one_colour_whatever_is_drawn():
    "In the figures whose marks are defenses, the mark beside its name in the legend is of its colour."
    for word in ('seeds', 'durability', 'selection', 'unseen'):
        for box in draw(word, 'figure').legends:
            for handle, text in zip(box.legend_handles, box.get_texts()):
                name = 'none' if text.get_text() == 'no defence' else text.get_text()
                if name not in LEFT: continue
                color = handle.get_facecolor() if hasattr(handle, 'get_facecolor') else handle.get_color()
                assert to_hex(color) == look(name)['color'], (word, name)


def test_colours_are_all_different_and_ours_is_the_strongest():
    known = [look(name)['color'] for name in [*DEFENSES, 'clean']]
    assert len(set(known)) == len(known)
    saturation = {name: np.ptp(plt.matplotlib.colors.to_rgb(look(name)['color'])) for name in DEFENSES}
    assert max(saturation, key=saturation.get) == 'invertune'


def test_a_new_defense_takes_a_free_colour_and_no_old_one_changes(monkeypatch):
    before = {name: look(name) for name in DEFENSES}
    monkeypatch.setitem(DEFENSES, 'aaa-new', lambda case: None)
    assert {name: look(name) for name in before} == before and look('aaa-new')['color'] not in {kind['color']
        for kind in before.values()}


def test_a_lost_model_is_hatched_in_every_panel_of_the_heat_map():
    fig = draw('main', 'figure')
    for ax, column in zip(fig.axes, (2, 3, 2)):                     # the second panel begins with the clean model
        hatched = [patch.get_xy() for patch in ax.patches if patch.get_hatch() == LOST['hatch']]
        assert hatched == [(column, 2)]                             # wanet x invertune-paper, and nothing else
        cells = [text.get_text() for text in ax.texts]
        assert cells.count('97.0*') == 0 and sum(cell.endswith('*')
                                                 for cell in cells) == 1   # sig x invertune-paper has failed
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['model lost: in no mean',
        '* failed: the model is given back as received']


def test_a_lost_model_is_in_no_mean_of_the_heat_map():
    values, lost = main._grid(DATA['main']['rows'][1:], 'asr')
    assert lost.loc['wanet', 'invertune-paper'] and values.loc['mean', 'invertune-paper'] == 60


def test_dots_keep_a_lost_seed_out_of_their_mean():
    fig, ax = plt.subplots()
    style.dots(ax, 0, [10, 20, 0], 'ft', [False, False, True])
    assert list(ax.lines[-1].get_ydata()) == [15, 15] and ax.lines[2].get_markerfacecolor() == 'none'
    plt.close(fig)


def test_the_bar_of_durability_is_drawn():
    for ax in draw('durability', 'figure').axes:
        assert any(list(line.get_ydata()) == [5, 5] for line in ax.lines) and any(text.get_text() == '5 %'
            for text in ax.texts)


def test_files_name_no_date_and_no_program(tmp_path):
    png, pdf = save_figure(draw('main', 'figure'), tmp_path/'fig')
    assert png.read_bytes()[:4] == b'\x89PNG' and b'Software' not in png.read_bytes()
    assert pdf.read_bytes()[:4] == b'%PDF' and b'CreationDate' not in pdf.read_bytes() and b'Producer' not in pdf.read_bytes()


def test_a_failed_write_leaves_the_old_figure(tmp_path, monkeypatch):
    save_figure(draw('main', 'figure'), tmp_path/'fig')
    before = contents(tmp_path)
    def half(self, file, **kwargs):
        file.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(plt.Figure, 'savefig', half)
    with pytest.raises(InvertuneError, match='No space left'): save_figure(draw('main', 'gallery'), tmp_path/'fig')
    assert contents(tmp_path) == before


def test_identification_draws_gains_in_percent_points_beside_the_strongest_other_class():
    ax, = main._identification({'sig': reports()}, {'sig': 'cat'}).axes
    assert [bar.get_width() for bar in ax.patches[:4]] == pytest.approx([-70/3, 140/3, 140/3, -55/3])
    assert [text.get_text() for text in ax.texts if text.get_text()] == ['sun', 'die',
        'ours: cat ✓   published: sun ✗'] and ax.get_title('left') == 'sig'
    assert [label.get_text() for label in ax.get_yticklabels()] == ['patch', 'smooth']


def test_a_family_of_the_published_rule_alone_has_a_row_and_its_ring():
    told = reports()
    told['invertune-paper']['identification'] = dict(family='corner', simulations=[uap('corner', 0, [.2, .7, .1])])
    ax, = main._identification({'sig': told}, {'sig': 'cat'}).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ['patch', 'smooth', 'corner patch']
    rings = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == 'o' and line.get_markerfacecolor() == 'none']
    assert rings == [2] and len(ax.patches) >= 6


def test_amplification_fills_the_range_without_clipping():
    for reach in (.01, .07, .2, .5, 1.):
        factor = main._amplification(torch.full((3, 8, 8), reach))
        assert factor in (1, 2, 4, 8, 16, 32) and (factor*reach <= .5 or factor == 1)


def test_both_differences_of_a_row_are_scaled_alike_and_the_asr_is_called_inverted():
    cells = main._gallery_cells(gallery())
    assert [text for _, text in cells] == ['', '', '× 4', 'none', 'none', 'inverted ASR 90.0 %', '× 4']
    assert cells[2][0].mean().item() == pytest.approx(.5 + 4*.1) and cells[6][0].mean().item() == pytest.approx(.5
        + 4*.2)


def test_a_gallery_row_is_read_and_a_sample_that_is_not_there_is_refused(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    monkeypatch.setattr(main, 'result_dir', lambda profile, stage,
                        *key: tmp_path.joinpath(profile, stage, *map(str, key)))
    folder = tmp_path/'toy/evaluate/0/badnet'
    folder.mkdir(parents=True)
    save_file({'clean': torch.zeros(2, 3, 8, 8), 'triggered': torch.ones(2, 3, 8, 8)}, folder/'samples.safetensors')
    for name in ('invertune-paper',
                 'invertune'): gallery()[name].save(tmp_path/f'toy/defend/0/badnet/{name}/bank.safetensors')
    read = main._gallery_row('toy', 0, 'badnet', 1)
    assert read['invertune'].asr[0] == pytest.approx(.9) and len(read['invertune-paper']) == 0
    with pytest.raises(InvertuneError, match='there is no sample 2'): main._gallery_row('toy', 0, 'badnet', 2)
    (folder/'samples.safetensors').write_bytes(b'not tensors')
    with pytest.raises(InvertuneError, match='safetensors'): main._gallery_row('toy', 0, 'badnet', 0)


def test_a_lost_seed_is_under_the_axis_and_said_so():
    fig = seeds.seeds.figures['figure'](DATA['seeds'])
    assert fig.axes[2].get_xlabel() == 'lost models under the axis of CA: 3' and fig.axes[2].get_ylim()[0] > 50


def test_a_legend_has_one_handle_a_defense():
    fig = plt.figure()
    legend(fig, ['none', 'ft', 'invertune-paper-given'], lost=True)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['no defence', 'ft',
        'invertune-paper, label given', 'model lost']
    plt.close(fig)
