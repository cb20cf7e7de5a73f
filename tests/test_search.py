"The engine of all steps: perturbations stay within bounds, places do not see each other, memory is bounded."
import math
from types import SimpleNamespace

import pytest
import torch

from invertune import search
from invertune.defender import Case
from invertune.metrics import embed
from invertune.model import Clip, pixels, tiny_clip
from invertune.runtime import InvertuneError
from invertune.search import (FAMILIES, FREE_TENSORS, TEMPERATURE, alikeness, alikeness_loss, class_shares, embed_draws,
                              images_at_once, log_probabilities, place_grid, random_perturbation, search_places, sign_step, target_loss,
                              target_probability, text_image_gap, universal_perturbation)
from invertune.triggers import Trigger, load_trigger


@pytest.fixture(scope='module')
def case(small): return Case(small.bad, small.defender)


# The dictionary

def draws(family, n=40, side=32):
    gen = torch.Generator().manual_seed(0)
    return [random_perturbation(family, side, gen) for _ in range(n)]


@pytest.mark.parametrize('side', [16, 32, 64])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_draw_is_a_picture_of_its_image(family, side, tmp_path):
    "Pixels in range, whatever the side; another draw is another; a file keeps it."
    x, tried = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)), draws(family, 20, side)
    made = torch.stack([t(x) for t in tried])
    assert made.isfinite().all() and made.min() >= 0 and made.max() <= 1 and all(t.side == side for t in tried)
    assert len({tuple(y.flatten()[::7].tolist()) for y in made}) == 20 and all((y - x).abs().max() > 0 for y in made)
    tried[0].save(tmp_path/'t.safetensors')
    assert torch.equal(load_trigger(tmp_path/'t.safetensors')(x), made[0])


def test_a_seed_draws_the_same():
    for family in FAMILIES:
        one, two = (random_perturbation(family, 32, seed) for seed in (3, torch.Generator().manual_seed(3)))
        assert all(torch.equal(v, two.tensors[k]) for k, v in one.tensors.items())


def test_a_field_has_a_budget():
    "The root mean square of what it adds, of every image; on gray images nothing is cut off."
    x = .5 + .01*torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in draws('field'):
        inside = t(x).amin((1, 2, 3)).gt(0) & t(x).amax((1, 2, 3)).lt(1)
        rms = (t(x) - x).pow(2).mean((1, 2, 3)).sqrt()
        assert torch.allclose(rms[inside], t.tensors['budget'].expand(int(inside.sum())), atol=1e-4)


def test_colours_keep_their_contrast():
    "Most of it, whatever the matrix, as long as no colour is cut off and the tone curve is a line; a tint is beside it."
    x = .5 + .05*torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in draws('colour'):
        t.tensors |= dict(tint=torch.zeros(1, 3), curve=torch.zeros(1, 5))
        kept = t(x).std((1, 2, 3)) / x.std((1, 2, 3))
        assert (kept > .57).all() and (kept < 1.05).all()


def test_filters_keep_the_brightness_and_flows_do_not_tear():
    x = torch.full((1, 3, 32, 32), .3)
    assert all(torch.allclose(t(x), x, atol=1e-4) for name in ('filter', 'flow') for t in draws(name))
    still = random_perturbation('flow', 32)
    still.tensors['grid'] = torch.zeros(1, 2, 4, 4)
    y = torch.rand(1, 3, 32, 32)
    assert torch.allclose(still(y), y, atol=1e-4)


def test_a_flow_has_a_budget():
    "Of displacement, a share of the side, however large its grid's numbers are."
    line = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    near = random_perturbation('flow', 32)
    near.tensors |= dict(grid=torch.ones(1, 2, 4, 4), budget=torch.tensor([2/32]))
    far = Trigger(near.kind, near.tensors | dict(grid=9 * near.tensors['grid']))
    shift = (near(line) - line)[..., 4:-4, 4:-4] * 31
    assert torch.allclose(shift, torch.full_like(shift, shift.mean().item()), atol=1e-3) and 1.5 < shift.abs().mean() < 2.5
    assert torch.allclose(near(line), far(line), atol=1e-5)


def test_patches_are_of_all_sizes_and_everywhere():
    masks = torch.cat([t.tensors['mask'] for t in draws('patch', 300)])[:, 0]
    share = (masks > 0).float().mean((1, 2))
    assert share.min() < .01 and share.max() > .08 and (masks > 0).any(0).all() and (masks[:, 0] > 0).any(1).sum() > 20


def test_embeddings_of_draws(case):
    x, tried = pixels(case.fit[:4]), draws('colour', 3)
    made = embed_draws(case.clip, x, tried)
    assert made.shape[:2] == (3, 4) and not made.requires_grad
    assert torch.allclose(made[1], case.clip.encode_image(tried[1](x)), atol=1e-5)


# The optimiser

@pytest.mark.parametrize('family', FAMILIES)
def test_a_step_moves_what_is_free(case, family):
    "Within its bounds, and another trigger: what came in stands still."
    old = random_perturbation(family, 32)
    kept = {k: v.clone() for k, v in old.tensors.items()}
    new = sign_step(case.clip, pixels(case.fit[:4]), old, lambda f: f.sum(), .1)
    assert all(torch.equal(old.tensors[k], v) for k, v in kept.items()) and new.meta == old.meta
    assert {k for k in kept if not torch.equal(new.tensors[k], kept[k])} == set(FREE_TENSORS[old.kind])
    for name, (low, high, reach) in FREE_TENSORS[old.kind].items():
        t = new.tensors[name]
        assert low <= t.min() and t.max() <= high and not t.requires_grad
        assert (t - kept[name].clamp(low, high)).abs().max() <= .1*reach + 1e-6


@pytest.mark.parametrize('family', FAMILIES)
def test_a_perturbation_does_what_it_is_asked_for(case, family):
    start, loss = random_perturbation(family, 32), target_loss(case.head, 4)
    made = universal_perturbation(case.clip, case.fit, start, loss, steps=10)
    before, after = (loss(embed(case.clip, case.test, t)).item() for t in (start, made))
    assert after < before - .05
    again = universal_perturbation(case.clip, case.fit, start, loss, steps=10)
    assert all(torch.equal(v, again.tensors[k]) for k, v in made.tensors.items())


# Micro-batches

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('loss', [lambda head: target_loss(head, 4), lambda head: alikeness_loss], ids=['class', 'alike'])
def test_micro_batches_have_the_gradient_of_the_whole(case, monkeypatch, family, loss):
    "Even of a loss that looks at all embeddings at once."
    x, t = pixels(case.fit[:11]), random_perturbation(family, 32)
    free = {k: v.clone().requires_grad_() for k, v in t.tensors.items() if k in FREE_TENSORS[t.kind]}
    change = lambda x: Trigger(t.kind, t.tensors | free)(x)
    def grads(n):
        monkeypatch.setattr(search, 'images_at_once', lambda clip: n)
        return search._gradients(case.clip, change, x, loss(case.head), list(free.values()))
    for whole, parts in zip(grads(11), grads(3)):
        assert (whole - parts).norm() < 1e-4 * whole.norm() and whole.norm() > 0


def test_memory_is_asked_of_the_model():
    "Four times the pixels keep about four times the memory; a model is asked once, and has no gradient after it."
    small, large = (tiny_clip(image_size=s, width=8) for s in (32, 64))
    few, many = images_at_once(large), images_at_once(small)
    assert 3 < many / few < 4.5 and search._KEPT[large] * few <= search._ROOM < search._KEPT[large] * (few + 1)
    assert all(p.grad is None for p in large.parameters())


def test_unknown_family():
    with pytest.raises(InvertuneError, match="Unknown family of perturbations 'fog'"): random_perturbation('fog', 32)


# Losses

def test_the_target_loss_is_a_cross_entropy_with_all_classes():
    gen = torch.Generator().manual_seed(0)
    f, head = (torch.nn.functional.normalize(torch.randn(n, 8, generator=gen), dim=1) for n in (12, 5))
    want = torch.nn.functional.cross_entropy(f @ head.T / .07, torch.full((12,), 3))
    assert TEMPERATURE == .07 and torch.allclose(target_loss(head, 3)(f), want)
    places = f.view(3, 4, 8)  # of three patches, four images each
    assert torch.allclose(target_loss(head, 3)(places), want)
    p = (f @ head.T / .07).softmax(1)[:, 3].view(3, 4)
    assert torch.allclose(target_probability(head, 3)(places), p.log().mean(1).exp())
    assert torch.allclose(log_probabilities(f, head).exp().sum(1), torch.ones(12))


def test_alikeness():
    f = torch.eye(4).view(2, 2, 4)
    same = f[:, :1].expand(2, 2, 4)
    assert torch.allclose(alikeness(f), torch.full((2,), .5**.5)) and torch.allclose(alikeness(same), torch.ones(2))
    assert torch.allclose(alikeness_loss(same), torch.tensor(-2.))


def test_class_shares():
    assert class_shares(torch.eye(4)[[0, 0, 1, 3]], torch.eye(4)).tolist() == [.5, .25, 0, .25]


def test_the_gap_is_of_the_class_that_fits_worse():
    "Images read as class 1 lie farther from its text; of one image too few nothing is said."
    cosines = torch.tensor([.9]*3 + [.5]*3 + [.8]*3 + [.1]*2)
    f = torch.zeros(11, 8).index_put((torch.arange(11), torch.tensor([0]*3 + [1]*3 + [2]*3 + [3]*2)), cosines)
    f[:, 4] = (1 - cosines**2).sqrt()
    seen = SimpleNamespace(embeddings=torch.cat([f, -torch.eye(8)]), head=torch.eye(8)[:4], classes=list('abcd'),
                           fit=range(6), select=range(5))  # the rest is to report on: nothing is read there
    assert text_image_gap(seen).tolist() == pytest.approx([-.1, .3, 0., 0.])


# Places

def test_a_grid_reaches_the_rim():
    assert place_grid(32, 8, 16) == [(i, j) for i in (0, 16, 24) for j in (0, 16, 24)]
    assert place_grid(224, 28, 28)[-1] == (196, 196) and len(place_grid(224, 28, 28)) == 64
    masks = search._place_masks([(24, 0), (0, 3)], 32, 8)
    assert masks[0, 0].nonzero().min(0).values.tolist() == [24, 0] and masks.flatten(1).sum(1).tolist() == [64, 64]


def search_all(case, **kw):
    goal = target_loss(case.head, 4), target_probability(case.head, 4)
    return search_places(case, place_grid(32, 8, 8), 8, *goal, steps=4, **kw)


def test_groups_change_nothing(case):
    few, many, again = (search_all(case, chunk=n) for n in (6, 10**6, 6))
    assert torch.equal(few.patterns, again.patterns) and torch.equal(few.scores, again.scores)
    assert (few.patterns - many.patterns).abs().mean() < 1e-3 and torch.allclose(few.scores, many.scores, atol=.01)


@pytest.mark.parametrize('chunk', [16, 48])
def test_no_more_images_at_once_than_allowed(case, monkeypatch, chunk):
    "The scan of 225 places asks no larger batch of the model than that of 16, whatever the number of places."
    images_at_once(case.clip)  # once asked, it is known of this model
    seen, encode = [], Clip.encode_image
    monkeypatch.setattr(Clip, 'encode_image', lambda self, x: seen.append(len(x)) or encode(self, x))
    goal = target_loss(case.head, 4), target_probability(case.head, 4)
    search_places(case, place_grid(32, 4, 2), 4, *goal, steps=1, chunk=chunk)
    assert max(seen) <= chunk and sum(seen) == 225*3 + 225*16


def test_a_patch_is_made_on_one_part_and_ranked_on_another(case, monkeypatch):
    "Images of the part that is reported on go through the model in neither."
    seen, whole = [], search._embed_places
    monkeypatch.setattr(search, '_embed_places', lambda clip, x, *a: seen.append(x) or whole(clip, x, *a))
    search_all(case)
    made, ranked = seen[:4], seen[-1]
    assert all(torch.equal(x, case.fit) for x in made) and torch.equal(ranked, case.select)


def test_places(case):
    found = search_all(case)
    best = found.best(3)
    assert [found.scores[i].item() for i in best] == sorted(found.scores.tolist(), reverse=True)[:3]
    assert len(found.best(99)) == len(found.places)
    trigger = found.trigger(best[0])
    assert trigger.meta == dict(family='patch') and trigger.tensors['mask'].sum() == 64
    f = embed(case.clip, case.select, trigger)
    lone = target_probability(case.head, 4)(f[None]).item()
    assert math.isclose(lone, found.scores[best[0]].item(), abs_tol=.25)  # other images of the same part
    assert found.heat().shape == (32, 32) and found._repr_png_()[:4] == b'\x89PNG'
