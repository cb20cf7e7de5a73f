"Four disjoint sets, from manifests or from photographs; damage is found, and said in one sentence."
import os, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invertune import data, pictograms
from invertune.data import SETS, Dataset, Split, assert_disjoint, balanced, load_dataset, make_manifests, photo_dataset, pictogram_dataset, set_hash
from invertune.lab.profiles import DATA, ROOT
from invertune.runtime import InvertuneError

SMOKE_EVALUATION = '93d8ae4b65dcd8d407b9c87087a553b0d4415c9f9bf1877a2819fff73390fd4f'  # of the 320 images of the smoke profile

@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    "Each test draws for itself"
    monkeypatch.setattr(data, 'CACHE', tmp_path/'cache')
    monkeypatch.delenv('INVERTUNE_PHOTOS', raising=False)
    return tmp_path/'cache'/'images'

def few(folder=DATA/'glyphs', n=32): return pictogram_dataset('few', image_size=32, path=str(folder), limit=dict.fromkeys(SETS, n))

# manifests

def test_the_documented_command_makes_the_manifests_in_git(tmp_path):
    make_manifests(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*.*'))
    assert made == sorted(p.relative_to(DATA) for p in DATA.rglob('*.*'))
    assert all((tmp_path/p).read_bytes() == (DATA/p).read_bytes() for p in made)

def test_no_two_rows_share_a_seed_or_an_id():
    rows = [r for name in SETS for r in pictograms.read_manifest(DATA/'glyphs'/f'{name}.csv')]
    assert len({r.seed for r in rows}) == len({r.id for r in rows}) == len({r.looks for r in rows}) == sum(data.SIZES.values())

@pytest.mark.parametrize('file, text, why', [
    ('classes.txt', 'anchor\nunicorn\n', "classes.txt, row 2: unknown class 'unicorn'"), ('classes.txt', '\n', 'classes.txt is empty'),
    ('classes.txt', 'anchor\nanchor\n', "row 2: the class 'anchor' is there twice"),
    ('templates.txt', 'a {}\na thing\n', "templates.txt, row 2: a template has {} once, not 'a thing'"),
    ('poison.csv', 'id\n', 'poison.csv, row 1: the header is not'), ('poison.csv', None, 'poison.csv cannot be read')])
def test_broken_input_is_named(tmp_path, file, text, why):
    for p in (DATA/'glyphs').iterdir(): (tmp_path/p.name).write_bytes(p.read_bytes())
    if text is None: (tmp_path/file).unlink()
    else: (tmp_path/file).write_text(text)
    with pytest.raises(InvertuneError) as e: few(tmp_path)['poison']
    assert why in str(e.value)

# images and their cache

def test_pictograms_are_the_same_everywhere():
    assert set_hash(load_dataset('smoke')['evaluation'].images) == SMOKE_EVALUATION

def test_splits_are_balanced_and_typed():
    split = few(n=64)['defender']
    assert split.images.shape == (64, 3, 32, 32) and split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
    assert len(split) == len(split.captions) == 64 and (torch.bincount(split.labels) == 2).all()

def test_second_time_comes_from_the_cache(monkeypatch, own_cache):
    first = few()['poison'].images
    monkeypatch.setattr(data, '_draw_all', lambda *_: pytest.fail('drawn again'))
    assert (few()['poison'].images == first).all()

@pytest.mark.parametrize('damage', [
    lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b''), lambda p: p.write_bytes(p.read_bytes()[:-1] + b'?'),
    lambda p: np.save(p, np.zeros(3)), lambda p: np.save(p, np.array([{}]), allow_pickle=True), lambda p: p.with_suffix('.sha256').unlink()])
def test_damaged_cache_is_drawn_again(own_cache, damage):
    first = few()['poison'].images
    damage(next(own_cache.glob('*.npy')))
    assert (few()['poison'].images == first).all()
    assert data._load_images(next(own_cache.glob('*.npy'))) is not None

def test_another_manifest_or_size_has_another_cache(own_cache, tmp_path):
    few()['poison'], few(n=33)['poison'], pictogram_dataset('x', image_size=16, limit={'poison': 32})['poison']
    assert len(list(own_cache.glob('*.npy'))) == 3

def test_full_disk_leaves_nothing_behind(monkeypatch, own_cache):
    def no_space(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'save', no_space)
    with pytest.raises(InvertuneError, match='No space left'): few()['poison']
    assert not list(own_cache.glob('*'))

def test_missing_font_stops_the_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(pictograms, 'font_path', lambda: tmp_path/'DejaVuSans.ttf')
    with pytest.raises(InvertuneError, match='reinstall matplotlib'): few()['poison']

# the four sets

@pytest.mark.parametrize('profile', ['smoke', pytest.param('glyphs', marks=pytest.mark.skipif('INVERTUNE_FULL' not in os.environ, reason='draws 29,200 images'))])
def test_no_image_is_in_two_sets(profile): assert len(set(assert_disjoint(load_dataset(profile)).values())) == 4

def test_a_shared_image_is_found():
    dataset = few()
    dataset['evaluation'].images[3] = dataset['pretrain'].images[5]
    with pytest.raises(InvertuneError, match='Image 3 of the set evaluation is also image 5 of the set pretrain'): assert_disjoint(dataset)

def test_unknown_names():
    with pytest.raises(InvertuneError, match="no set 'test'"): few()['test']
    with pytest.raises(InvertuneError, match='Unknown profile'): load_dataset('cc3m')
    with pytest.raises(InvertuneError, match='parameter classes is 33'): pictogram_dataset('x', classes=33)

@pytest.mark.parametrize('changes, why', [({'source': 'web'}, 'Unknown source of data'), ({'image_size': '64'}, "'image_size' is '64'"), ({'limit': {'test': 3}}, 'Unknown set in limit'),
                                          ({'limit': {'poison': 'all'}}, "'poison' is 'all'"), ({'colour': 1}, 'Unknown parameter of data')])
def test_bad_parameters(monkeypatch, changes, why):
    monkeypatch.setattr(data, 'stage_params', lambda *_: {'profile': 'x', 'seed': 0, 'source': 'glyphs', **changes})
    with pytest.raises(InvertuneError, match=why): load_dataset('x')

def test_balanced_takes_the_first_of_each_class():
    assert balanced([1, 1, 1, 0, 0, 0], 2) == [0, 3]
    assert balanced([0, 1, 0], 99) == [0, 1, 2]

# photographs

@pytest.fixture
def photos(tmp_path):
    "30 small images of two classes, parted into train and test"
    rng = np.random.default_rng(0)
    for k in range(30):
        p = tmp_path/'photos'/('train' if k < 20 else 'test')/('guinea_pig', 'fox')[k % 2]/f'{k:02}.png'
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(p)
    return tmp_path/'photos'

def load(path, **kw): return photo_dataset('toy', image_size=16, path=str(path), **kw)

def test_folder(photos):
    dataset = load(photos)
    assert dataset.classes == ['fox', 'guinea pig'] and [len(dataset[n]) for n in SETS] == [10, 6, 4, 10]
    assert all(dataset.classes[y] in c for c, y in zip(dataset['poison'].captions, dataset['poison'].labels))
    assert_disjoint(dataset)

def test_same_deal_each_time(photos):
    assert assert_disjoint(load(photos)) == assert_disjoint(load(photos)) != assert_disjoint(load(photos, deal=1))
    assert load(photos)['poison'].captions == load(photos)['poison'].captions

def test_zip_is_the_same_as_the_folder(photos, tmp_path):
    with zipfile.ZipFile(p := tmp_path/'photos.zip', 'w') as z:
        for f in photos.rglob('*.png'): z.write(f, 'top/' + f.relative_to(photos).as_posix())
    assert assert_disjoint(load(p)) == assert_disjoint(load(photos))

def test_one_level_is_parted_by_name(photos, tmp_path):
    for f in photos.rglob('*.png'): f.rename((tmp_path/'flat'/f.parent.name).mkdir(parents=True, exist_ok=True) or tmp_path/'flat'/f.parent.name/f.name)
    sizes = [len(load(tmp_path/'flat')[n]) for n in SETS]
    assert sum(sizes) == 30 and min(sizes) > 0

def test_copies_are_dropped_and_evaluation_keeps_its_own(photos):
    (photos/'train'/'fox'/'copy.png').write_bytes(next((photos/'test'/'fox').iterdir()).read_bytes())
    dataset = load(photos)
    assert [len(dataset[n]) for n in SETS] == [10, 6, 4, 10]
    assert_disjoint(dataset)

@pytest.mark.parametrize('damage', [lambda b: b'no image', lambda b: b[:len(b)//2], lambda b: b''])
def test_unreadable_image_is_named(photos, damage):
    p = photos/'train'/'fox'/'01.png'
    p.write_bytes(damage(p.read_bytes()))
    with pytest.raises(InvertuneError, match='train/fox/01.png cannot be read'): load(photos)

def test_changed_photo_is_read_again(photos):
    before = assert_disjoint(load(photos))
    Image.new('RGB', (9, 9), 'red').save(photos/'train'/'fox'/'01.png')
    assert assert_disjoint(load(photos)) != before

def test_no_photos(photos, tmp_path):
    with pytest.raises(InvertuneError, match='set INVERTUNE_PHOTOS'): load(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(InvertuneError, match='holds no images'): load(tmp_path/'empty')
    (tmp_path/'x.zip').write_bytes(b'no zip')
    with pytest.raises(InvertuneError, match='not a readable .zip'): load(tmp_path/'x.zip')

def test_the_variable_names_the_photos(photos, monkeypatch):
    monkeypatch.setenv('INVERTUNE_PHOTOS', str(photos))
    assert len(load_dataset('photos')['pretrain']) == 10

def real_photos():
    "Photographs for trials, where there are any; they are no part of the project"
    found = [p for p in (os.environ.get('INVERTUNE_PHOTOS'), ROOT.parent/'shared'/'data'/'cifar10-photos.zip') if p and Path(p).exists()]
    return found[0] if found else None

REAL = real_photos()

@pytest.mark.skipif(REAL is None, reason='no photographs here: set INVERTUNE_PHOTOS')
def test_real_photographs(monkeypatch):
    monkeypatch.setenv('INVERTUNE_PHOTOS', str(REAL))
    dataset = load_dataset('photos')
    assert_disjoint(dataset)
    for name in SETS:
        n = torch.bincount(dataset[name].labels)
        assert len(n) == len(dataset.classes) and n.max() - n.min() <= max(2, .02*n.max())
        assert dataset[name].images.float().std() > 30
