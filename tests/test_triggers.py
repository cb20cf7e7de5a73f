"What is drawn anew for every image depends on the image alone; what does not fit is refused; everything draws itself."
import pytest
import torch

from invertune.runtime import InvertuneError
from invertune.triggers import (KINDS, Trigger, blended_trigger, load_trigger, patch_at, patch_trigger, sig_trigger,
                                text_trigger, tile_rows, wanet_trigger)

DRAWN = dict(noise=patch_trigger(32, size=56, pattern='noise'), anywhere=patch_trigger(32, size=56, place='anywhere'))
ALL = dict(DRAWN, patch=patch_trigger(32), blended=blended_trigger(32), sig=sig_trigger(32), wanet=wanet_trigger(32),
           text=text_trigger(32),
           coarse=Trigger('coarse', dict(mask=torch.full((1, 1, 32, 32), .2), coarse=torch.rand(1, 3, 4, 4))))


def batch(n=12): return torch.randint(256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255


@pytest.mark.parametrize('name', DRAWN)
def test_neither_the_batch_nor_its_order_matters(name):
    x, trigger = batch(), DRAWN[name]
    whole = trigger(x)
    assert torch.equal(whole, trigger(x)) and torch.equal(whole.flip(0), trigger(x.flip(0)))
    for size in (1, 5): assert torch.equal(whole, torch.cat([trigger(part) for part in x.split(size)]))


def test_every_image_has_noise_of_its_own():
    "Also the first of one batch and the first of the next."
    noise = DRAWN['noise'](batch())[..., -8:, -8:]
    assert len({tuple(n.flatten().tolist()) for n in noise}) == 12 and noise.std() > .25


def test_every_image_has_a_place_of_its_own():
    x = batch(40)
    hit = (DRAWN['anywhere'](x) != x).any(1)
    places = {tuple(h.nonzero().min(0).values.tolist()) for h in hit}
    assert len(places) > 30 and max(map(max, places)) <= 24 and (hit.flatten(1).sum(1) >= 60).all()


@pytest.mark.parametrize('name', DRAWN)
def test_what_came_in_is_as_it_was(name):
    x = batch()
    DRAWN[name](x)
    assert torch.equal(x, batch())


@pytest.mark.parametrize('place', ['corner', 'center', 'random', 'anywhere'])
def test_a_patch_has_to_fit(place):
    for size in (230, 300, 0, -16):
        with pytest.raises(InvertuneError, match=f'size {size} does not fit'): patch_trigger(32, 0, size, place)
    whole = patch_trigger(32, 0, 224, place)(batch(2))
    assert torch.equal(whole[0], whole[1])
    with pytest.raises(InvertuneError, match='40 pixels does not fit'): patch_at(torch.ones(3, 40, 40), 32, 0, 0)


@pytest.mark.parametrize('name', [n for n in ALL if n != 'anywhere'])
def test_images_of_another_size(name):
    with pytest.raises(InvertuneError, match='a trigger for images of 32 pixels a side was put on images of 64'):
        ALL[name](torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize('name', ALL)
def test_it_draws_itself(name, tmp_path):
    ALL[name].save(tmp_path/'trigger.safetensors')
    for trigger in (ALL[name], load_trigger(tmp_path/'trigger.safetensors')):
        card, hit, change = trigger.tiles()
        assert not torch.equal(card, hit) and 0 <= change.min() and change.max() <= 1 + 1e-6
        assert trigger._repr_png_()[:4] == b'\x89PNG'
    own = {kind for kind, function in KINDS.items() if function.__module__ == 'invertune.triggers'}
    assert {t.kind for t in ALL.values()} | {'warp'} == own


def test_tiles_of_any_size_lie_side_by_side():
    rows = [[torch.zeros(3, 32, 32), torch.zeros(16, 16)], [torch.zeros(3, 8, 8)]]
    page = tile_rows(rows, [['a', 'b'], ['c']], height=64)
    assert page.size == (2*70 + 6, 2*(64 + 6 + 15) + 6)
    assert page.getpixel((6, 6+15)) == (0, 0, 0) and page.getpixel((page.width-2, page.height-2)) == (255, 255, 255)
