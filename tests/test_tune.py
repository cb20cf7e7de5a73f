"What a tuning changes and what it leaves alone, as published and ours."
import json

import pytest
import torch

import invertune.compat  # before open_clip
import open_clip
from invertune import tune as step3
from invertune.defender import Case, Defender
from invertune.invert import Bank
from invertune.metrics import embed
from invertune.model import Clip, load_clip, pixels, save_clip, tiny_clip
from invertune.runtime import InvertuneError
from invertune.search import FAMILIES, random_perturbation, sign_step
from invertune.triggers import Trigger
from invertune.tune import (_absorb_bn_stats, _ENOUGH, _inspect_layers, _prototypes, _select_layers, _update_bn_stats, _varied, _warm_adamw,
                            between, tune, tune_paper)


def says(sentence): return pytest.raises(InvertuneError, match=sentence)
def state(clip): return {k: v.clone() for k, v in clip.state_dict().items()}
def same(one, other): return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture(scope='module')
def defender(small):
    d = small.defender
    return Defender(d.images[:64].clone(), d.captions[:64], small.classes, small.templates)


@pytest.fixture(scope='module')
def received(small, tmp_path_factory):
    "The suspicious model as the pipeline hands it over: read from a file."
    file = tmp_path_factory.mktemp('poison')/'model.safetensors'
    save_clip(small.bad, file)
    return load_clip(file)


@pytest.fixture(scope='module')
def case(received, defender): return Case(received, defender)


@pytest.fixture(scope='module')
def bank(): return Bank([random_perturbation('patch', 32)], [1.])


@pytest.fixture(scope='module')
def tuned(case, bank):
    "Both tunings, once"
    before = state(case.clip), case.images.clone(), {k: v.clone() for k, v in bank[0].tensors.items()}
    paper, ours = tune_paper(case, 4, bank, steps=3, lr=1e-3), tune(case, 4, bank, steps=4)
    return before, dict(paper=paper, ours=ours)


def test_clean_images_are_moved_a_little_and_by_other_amounts_every_time(case):
    x, gen = pixels(case.images[:8]), torch.Generator().manual_seed(0)
    one, two = _varied(x, .5, gen), _varied(x, .5, gen)
    assert one.shape == x.shape and torch.equal(one[4:], x[4:]) and not torch.equal(one[:4], two[:4])
    assert (one[:4] - x[:4]).abs().mean() < (x[:4] - x[4:]).abs().mean()  # nearer to itself than to another one
    assert torch.equal(_varied(x, 0., gen), x)


def test_between_is_as_received_at_one_end_and_as_tuned_at_the_other(case, tuned):
    ours, f0 = tuned[1]['ours'][0], case.embeddings
    def away(alpha): return (embed(between(case, ours, alpha), case.images) - f0).norm(dim=1).mean().item()
    assert away(0.) < .2 * away(1.) and away(0.) < away(.5) < away(1.)
    assert same(state(between(case, ours, 1., ())), state(ours)) and ours is not between(case, ours, 1., ())


def test_alpha_is_how_far_the_tuning_goes(case, bank, tuned):
    whole, half = tune(case, 4, bank, steps=4, alpha=1.)[0], tune(case, 4, bank, steps=4, alpha=.5)[0]
    assert same(state(half), state(between(case, whole, .5)))


@pytest.mark.parametrize('tower, least', [('resnet', 14), ('vit', 8)])
def test_normalisations_learn_faster_and_all_else_slower_where_images_are_few(tower, least):
    "Every parameter of the image tower is in one of the two groups; the text tower in neither."
    clip = tiny_clip(tower, image_size=32, width=8, text_width=32, text_layers=1, embed_dim=32, context=8)
    def groups(n_images):
        few, many = _warm_adamw(clip, 10, 1e-3, 5., n_images)[0].param_groups
        return few['params'], many['params'], few['initial_lr'], many['initial_lr']
    few, many, fast, slow = groups(_ENOUGH)
    assert {*map(id, few)} | {*map(id, many)} == {*map(id, clip.model.visual.parameters())} and not {*map(id, few)} & {*map(id, many)}
    assert len(few) > least and all(p.ndim == 1 for p in few) and (fast, slow) == pytest.approx((5e-3, 1e-3))
    assert groups(_ENOUGH // 4)[2:] == pytest.approx((5e-3, 2.5e-4)) and groups(4*_ENOUGH)[2:] == (fast, slow)


def test_micro_batches_have_the_gradient_of_the_whole(case, bank, monkeypatch):
    x, found = pixels(case.images[:11]), _inspect_layers(case.clip, case.images, bank[0])
    def grads(n):
        monkeypatch.setattr(step3, 'images_at_once', lambda clip: n)
        tuned, told = _absorb_bn_stats(case.clip, case.images), {}
        with torch.no_grad(): tuned.model.visual.conv1.weight *= 1.1  # or all of `preserve` would be noise
        parts = step3._micro_batches(tuned, case.clip, x, bank[0](x), found, case.head, case.head[4:5], step3.WEIGHTS, told)
        for loss in parts: loss.backward()
        return [p.grad for p in tuned.model.visual.parameters()], told
    (whole, terms), (parts, same_terms) = grads(22), grads(8)
    assert terms == pytest.approx(same_terms, abs=1e-5) and terms['activation'] > 0 < terms['preserve']
    for a, b in zip(whole, parts): assert (a - b).norm() <= 1e-3 * a.norm() + 1e-6


@pytest.mark.parametrize('name', ['paper', 'ours'])
def test_what_came_in_is_as_it_was(tuned, case, bank, name):
    "The model, its hooks, the images, the bank. What comes out differs, can be trained on, and its report is JSON."
    (weights, images, trigger), made = tuned
    clip, report = made[name]
    assert same(state(case.clip), weights) and torch.equal(case.images, images) and same(bank[0].tensors, trigger)
    assert clip is not case.clip and not same(state(clip), weights)
    assert all(v.isfinite().all() for v in clip.state_dict().values())
    for m in (clip, case.clip):
        assert not m.training and all(p.requires_grad and not p._backward_hooks for p in m.parameters())
    assert {'layers', 'layers_after', 'selected', 'critical', 'curve'} <= json.loads(json.dumps(report)).keys()


def test_the_published_tuning_leaves_text_and_statistics_alone(tuned):
    "The text tower and BatchNorm's running statistics are those of the received model."
    (before, _, _), made = tuned
    after = made['paper'][0].state_dict()
    kept = [k for k in before if not k.startswith('model.visual.') or 'running' in k or 'num_batches' in k]
    assert len(kept) > 20 and all(torch.equal(before[k], after[k]) for k in kept)


def test_only_critical_rows_of_the_selected_layers_move(case, bank):
    "As published: nothing but the selected layers, and in tensors of their width only the rows of critical channels."
    clip, report = tune_paper(case, 4, bank, steps=3, lr=1e-3)
    mask = _inspect_layers(case.clip, case.images, bank[0])['masks'][report['selected'][0]]
    rows = mask.flatten(1).any(1)
    assert 0 < rows.sum() < len(rows) and report['critical'][report['selected'][0]]['channels'] == rows.sum()
    moved = {k for k, v in clip.state_dict().items() if not torch.equal(v, case.clip.state_dict()[k])}
    assert moved and all(k.startswith(tuple(f'model.visual.{n}.' for n in report['selected'])) for k in moved)
    k = f"model.visual.{report['selected'][0]}.0.conv3.weight"
    decayed = case.clip.state_dict()[k]*(1 - 1e-3*1e-4)**3  # by AdamW alone
    change = (clip.state_dict()[k] - decayed).abs().flatten(1).amax(1)
    assert k in moved and change[~rows].max() < 1e-6 < change[rows].max()


def test_ours_takes_the_statistics_of_clean_images(tuned, case):
    "Those of the weights that it delivers; the text tower is the received one."
    (before, _, _), made = tuned
    clip = made['ours'][0]
    after = state(clip)
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith('model.visual.'))
    _update_bn_stats(clip, case.images)
    assert all(torch.allclose(v, clip.state_dict()[k], atol=1e-6) for k, v in after.items() if 'running' in k)
    assert any(not torch.allclose(before[k], after[k]) for k in before if 'running' in k)


def test_statistics_as_received(case, bank):
    "Whoever asks for neither gets BatchNorm's statistics as they came."
    clip, _ = tune(case, 4, bank, steps=2, statistics=())
    assert all(torch.equal(v, case.clip.state_dict()[k]) for k, v in clip.state_dict().items() if 'running' in k)


def test_a_tower_without_batchnorm(defender, bank):
    "Nothing to absorb, nothing to follow; it is tuned all the same."
    vit = tiny_clip('vit', width=4, layers=(1, 1), image_size=32, text_width=32, text_layers=1, embed_dim=32, context=8)
    clip, _ = tune(Case(vit, defender), 4, bank, steps=2)
    assert same(state(_absorb_bn_stats(vit, defender.images)), state(vit)) and not same(state(clip), state(vit))


def test_absorbing_changes_statistics_and_no_function(received, defender):
    "Statistics become those of the clean images; every image is embedded as before, and the received model stays."
    before, gen = state(received), torch.Generator().manual_seed(0)
    noise = torch.randint(256, (16, *defender.images.shape[1:]), dtype=torch.uint8, generator=gen)
    made, seen = _absorb_bn_stats(received, defender.images), []
    for images in (defender.images, noise):
        assert torch.allclose(embed(made, images), embed(received, images), atol=1e-5)
    assert same(state(received), before)
    first, old = (next(m for m in c.modules() if isinstance(m, torch.nn.BatchNorm2d)) for c in (made, received))
    handle = first.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(): made.encode_image(pixels(defender.images))
    handle.remove()
    x = seen[0].transpose(0, 1).flatten(1)
    assert torch.allclose(first.running_mean, x.mean(1), atol=1e-5)
    assert torch.allclose(first.running_var, x.var(1, correction=0), rtol=1e-3)
    assert not torch.allclose(first.running_mean, old.running_mean)


def shared(case, bank, pool=None, step=0, **mover):
    "16 images, and what one step makes of them."
    x, gen, mover = pixels(case.images[:16]), torch.Generator().manual_seed(0), step3.MOVER | dict(steps=0) | mover
    pool = {} if pool is None else pool
    return x, step3._step_triggered(case.clip, x, step, bank, pool, tuple(FAMILIES), [case.head], 4, gen, mover)


def test_a_batch_is_shared(case, bank):
    "Half of it under the bank's triggers, the rest under the dictionary's; every image stays at its place."
    late, pool = Bank(bank.triggers, bank.asr), {}
    x, made = shared(case, late, others=0.)
    assert torch.equal(made, bank[0](x))
    _, half = shared(case, late, pool)
    assert torch.equal(half[:8], made[:8]) and list(pool) == [list(FAMILIES)[0]] and pool['field'][1] == 1
    assert half.shape == x.shape and (half[8:] - x[8:]).abs().amax((1, 2, 3)).min() > 0
    assert not torch.equal(shared(case, late, others=1.)[1][:8], made[:8])
    for step in range(1, 12): shared(case, late, pool, step)
    assert list(pool) == list(FAMILIES) and all(turns == 2 for _, turns in pool.values())


def test_what_opens_early_is_shown_as_it_was_found(case, bank):
    "On half of the bank's share, at strengths of its own; the other half moves."
    early = Bank(bank.triggers, bank.asr, early=1)
    x, made = shared(case, early, others=0., jitter=0, early=(.25, .75))
    change, whole = ((y - x).abs().amax((1, 2, 3)) for y in (made, bank[0](x)))
    shares = change / whole
    assert (shares[:8] > .24).all() and (shares[:8] < .76).all() and shares[:8].std() > 0
    assert torch.equal(made[8:], bank[0](x)[8:])


def test_an_adversarial_member_keeps_up_and_starts_again(case, bank, monkeypatch):
    "It is renewed on its first turn and after so many; between, it goes on from where it was."
    renewed, whole = [], step3._renewed
    monkeypatch.setattr(step3, '_renewed', lambda *a: renewed.append(turn) or whole(*a))
    x, pool, gen, loss = pixels(case.images[:8]), {}, torch.Generator().manual_seed(0), lambda f: f.sum()
    members = []
    for turn in range(7):
        step3._others(case.clip, x, pool, turn, ('flow',), loss, gen, step3.MOVER | dict(renew=3))
        members.append(pool['flow'][0].tensors['grid'])
    assert renewed == [0, 3, 6] and members[0].shape == members[1].shape == members[2].shape
    assert (members[1] - members[0]).abs().max() <= step3.MOVER['follow'] * step3.MOVER['step_size'] + 1e-6


def test_the_target_is_its_text_and_its_prototype(case, bank):
    "A triggered image must come near neither; whoever asks for the text alone gets another model."
    near = _prototypes(case.embeddings, case.head)
    own = embed(case.clip, case.images[case.reads == 4]).mean(0)
    assert torch.allclose(near[4], torch.nn.functional.normalize(own, dim=0), atol=1e-6)
    x, masks = pixels(case.images[:16]), _inspect_layers(case.clip, case.images, bank[0])['masks']
    def term(*aims):
        terms = step3._loss_terms(case.clip, case.clip, x, bank[0](x), masks, case.head, torch.stack(aims), 0.)
        return terms['embedding'].item()
    assert term(case.head[4], near[4]) >= max(term(case.head[4]), term(near[4])) > 0
    still = dict(steps=2, mover=dict(steps=0))
    one, two = (tune(case, 4, bank, weights=dict(prototype=p), **still)[0] for p in (True, False))
    assert not same(state(one), state(two))


def test_a_restarted_trigger_is_of_the_same_family(case):
    gen = torch.Generator().manual_seed(0)
    for family in FAMILIES:
        old = random_perturbation(family, 32, seed=1)
        kept = {k: v.clone() for k, v in old.tensors.items()}
        new, again = step3._restarted(old, 2, 2, gen), step3._restarted(old, 0, 9, gen, anew=0.)
        assert new.kind == old.kind and new.meta['family'] == family and not same(new.tensors, kept)
        assert new.tensors.keys() == kept.keys() and same(again.tensors, kept)
        moved = sign_step(case.clip, pixels(case.images[:4]), again, lambda f: f.sum(), .1)
        assert not same(moved.tensors, kept) and same(old.tensors, kept)  # the bank's own stands still


def test_a_patch_wanders_no_further_than_it_may():
    gen, mask = torch.Generator().manual_seed(0), torch.zeros(1, 1, 32, 32)
    mask[..., 28:, 28:] = 1
    patch = Trigger('mask', dict(mask=mask, pattern=torch.rand(1, 3, 32, 32, generator=gen)), family='place')
    def place(anew): return step3._restarted(patch, 2, 16, gen, anew).tensors['mask'][0, 0].nonzero().min(0).values
    def aside(anew): return {tuple(place(anew).tolist()) for _ in range(300)}
    near, far = aside(0.), aside(1.)
    assert near == {(y, x) for y in (26, 27, 28) for x in (26, 27, 28)} and 12 <= min(min(far)) < 20
    assert max(max(far)) == 28
    for _ in range(9): assert step3._restarted(patch, 4, 16, gen).tensors['mask'].sum() == 16


def test_a_failed_inversion_is_refused(case):
    "There is nothing to tune against, and no fall-back to the best of what failed."
    with says('the inversion has failed: .*; there is nothing to tune against'):
        tune(case, 4, Bank([random_perturbation('patch', 32)], [.69]), steps=1)


@pytest.mark.parametrize('kw, sentence', [
    (dict(weights=dict(activations=0.)), "unknown weight 'activations': choose from activation"),
    (dict(mover=dict(moves=0)), "unknown setting of the mover 'moves'"),
    (dict(statistics=['absorbed']), "unknown choice of statistics 'absorbed'")])
def test_unknown_settings(case, bank, kw, sentence):
    with says(sentence): tune(case, 4, bank, **kw)
    with says("unknown layer rule 'top4'"): _select_layers({'layer1': 1.}, 'top4')


def test_a_tuning_that_diverges(case, bank):
    "An error, not a model."
    with says(r'tune \(paper\): the loss became'): tune_paper(case, 4, bank, steps=20, lr=1e25)
    with says('tune: the loss became'): tune(case, 4, bank, steps=20, lr=1e25)


@pytest.mark.parametrize('timm_name, pool, proj', [('test_vit', 'map', 'none'), ('test_convnext', '', 'linear')])
def test_towers_of_timm_are_tuned(small, timm_name, pool, proj):
    "As SigLIP's and open_clip's ConvNeXt; nothing but the image tower moves."
    vision = open_clip.model.CLIPVisionCfg(timm_model_name=timm_name, timm_pool=pool, timm_proj=proj, image_size=32)
    text = open_clip.model.CLIPTextCfg(context_length=8, width=32, heads=1, layers=1)
    d, clip = small.defender, Clip(open_clip.model.CLIP(64, vision, text), 8).eval()
    case = Case(clip, Defender(d.images[:32], d.captions[:32], small.classes, small.templates))
    bank = Bank([random_perturbation('patch', 32)], [1.])
    for how in (tune, tune_paper):
        made, report = how(case, 0, bank, steps=2)
        moved = {k for k, v in made.state_dict().items() if not torch.equal(v, clip.state_dict()[k])}
        assert moved and all(k.startswith('model.visual.') for k in moved) and report['selected']
