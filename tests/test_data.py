"Four disjoint sets, from manifests or from photographs; damage is found, and said in one sentence."
import hashlib
import io
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invertune import data, glyphs
from invertune.data import (SETS, assert_disjoint, _make_manifests, photo_dataset, pictogram_dataset,
                            read_templates, _set_hash)
from invertune.glyphs import read_manifest
from invertune.runtime import InvertuneError

DATA = Path(__file__).parent.parent/'data'
# pixels of the smoke profile's 320 images
SMOKE_EVALUATION = '93d8ae4b65dcd8d407b9c87087a553b0d4415c9f9bf1877a2819fff73390fd4f'


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    "Each test draws for itself."
    monkeypatch.setenv('INVERTUNE_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'/'images'


def few(folder=DATA/'glyphs', n=32, **kw):
    return pictogram_dataset(folder, image_size=32, limit=dict.fromkeys(SETS, n), **kw)


# manifests

def test_the_documented_command_makes_the_manifests_in_git(tmp_path):
    _make_manifests(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*.*'))
    assert made == sorted(p.relative_to(DATA) for p in DATA.rglob('*.*'))
    assert all((tmp_path/p).read_bytes() == (DATA/p).read_bytes() for p in made)


def test_no_two_rows_share_a_seed_or_an_id():
    rows = [r for name in SETS for r in read_manifest(DATA/'glyphs'/f'{name}.csv')]
    assert (len({r.seed for r in rows}) == len({r.id for r in rows}) == len({r.looks for r in rows})
            == sum(data._SIZES.values()))


def copy_glyphs(to):
    for p in (DATA/'glyphs').iterdir(): (to/p.name).write_bytes(p.read_bytes())


@pytest.mark.parametrize('file, text, why', [
    ('classes.txt', 'anchor\nunicorn\n', "classes.txt, row 2: unknown class 'unicorn'"),
    ('classes.txt', '\n', 'classes.txt is empty'),
    ('classes.txt', 'anchor\nanchor\n', "row 2: the class 'anchor' is there twice"),
    ('templates.txt', 'a {}\na thing\n', "templates.txt, row 2: a template has {} once, not 'a thing'"),
    ('templates.txt', 'a {} }\n', 'a template has {} once'),
    ('templates.txt', 'a {} of {}\n', 'a template has {} once'),
    ('poison.csv', 'id\n', 'poison.csv, row 1: the header is not'), ('poison.csv', None, 'poison.csv cannot be read')])
def test_broken_input_is_named(tmp_path, file, text, why):
    copy_glyphs(tmp_path)
    if text is None: (tmp_path/file).unlink()
    else: (tmp_path/file).write_text(text)
    with pytest.raises(InvertuneError) as e: few(tmp_path)['poison']
    assert why in str(e.value)


@pytest.mark.parametrize('saved', [lambda b: b'\xef\xbb\xbf' + b,
                                   lambda b: b.replace(b'\n', b'\r\n'), lambda b: b + b'\n\n'])
def test_text_files_of_another_editor(tmp_path, saved):
    copy_glyphs(tmp_path)
    for name in 'classes.txt', 'templates.txt', 'poison.csv':
        (tmp_path/name).write_bytes(saved((tmp_path/name).read_bytes()))
    here, there = few(tmp_path), few()
    assert here.classes == there.classes and here.templates == there.templates
    assert _set_hash(here['poison']) == _set_hash(there['poison'])


# images and their cache

def test_pictograms_are_the_same_everywhere():
    dataset = pictogram_dataset(DATA/'glyphs', image_size=32, classes=4, limit={'evaluation': 320})
    pixels = b''.join(hashlib.sha256(x.numpy().tobytes()).digest() for x in dataset['evaluation'].images)
    assert hashlib.sha256(pixels).hexdigest() == SMOKE_EVALUATION


def test_splits_are_balanced_and_typed():
    split = few(n=64)['defender']
    assert split.images.shape == (64, 3, 32, 32) and split.images.dtype == torch.uint8
    assert split.labels.dtype == torch.int64
    assert len(split) == len(split.captions) == 64 and (torch.bincount(split.labels) == 2).all()


def test_second_time_comes_from_the_cache(monkeypatch):
    first = few()['poison'].images
    monkeypatch.setattr(data, '_draw_all', lambda *_: pytest.fail('drawn again'))
    assert (few()['poison'].images == first).all()


def test_the_cache_lies_where_the_caller_says(tmp_path, own_cache):
    few(cache=tmp_path/'here')['poison']
    assert list((tmp_path/'here'/'images').glob('*.npy')) and not own_cache.exists()


@pytest.mark.parametrize('damage', [
    lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b''),
    lambda p: p.write_bytes(p.read_bytes()[:-1] + b'?'),
    lambda p: np.save(p, np.zeros(3)), lambda p: np.save(p, np.array([{}]), allow_pickle=True),
    lambda p: p.with_suffix('.sha256').unlink()])
def test_damaged_cache_is_drawn_again(own_cache, damage):
    first = few()['poison'].images
    damage(next(own_cache.glob('*.npy')))
    assert (few()['poison'].images == first).all()
    assert data._load_images(next(own_cache.glob('*.npy'))) is not None


def test_another_manifest_or_size_has_another_cache(own_cache):
    few()['poison']
    few(n=33)['poison']
    pictogram_dataset(DATA/'glyphs', image_size=16, limit={'poison': 32})['poison']
    assert len(list(own_cache.glob('*.npy'))) == 3


def test_full_disk_leaves_nothing_behind(monkeypatch, own_cache):
    def no_space(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'save', no_space)
    with pytest.raises(InvertuneError, match='No space left.*INVERTUNE_CACHE'): few()['poison']
    assert not list(own_cache.glob('*'))


def test_missing_font_stops_the_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, 'font_path', lambda: tmp_path/'DejaVuSans.ttf')
    with pytest.raises(InvertuneError, match='reinstall matplotlib'): few()['poison']


# the four sets

@pytest.mark.parametrize('n', [320, pytest.param(10**6, marks=pytest.mark.skipif(
    'INVERTUNE_FULL' not in os.environ, reason='draws 29,200 images'))])
def test_no_image_is_in_two_sets(n): assert len(set(assert_disjoint(few(n=n)).values())) == 4


def test_a_shared_image_is_found():
    dataset = few()
    dataset['evaluation'].images[3] = dataset['pretrain'].images[5]
    with pytest.raises(InvertuneError, match='Image 3 of the set evaluation is also image 5 of the set pretrain'):
        assert_disjoint(dataset)


@pytest.mark.parametrize('change', [
    lambda s: s.captions.__setitem__(3, s.captions[3] + ' '), lambda s: s.captions.reverse(),
    lambda s: s.labels.__setitem__(3, (s.labels[3] + 1) % 32), lambda s: s.images[3, 0, 0].__ixor__(1)])
def test_the_hash_sees_every_change(change):
    split = few()['poison']
    before = _set_hash(split)
    change(split)
    assert _set_hash(split) != before
    assert _set_hash(few()['poison']) == before


def test_captions_cannot_be_cut_otherwise():
    "Two captions are not the same as one that holds both."
    split = few(n=32)['poison']
    split.captions[:2] = ['a', 'bc']
    before = _set_hash(split)
    split.captions[:2] = ['ab', 'c']
    assert _set_hash(split) != before


def test_a_set_draws_itself():
    png = Image.open(io.BytesIO(few()['poison']._repr_png_()))
    assert png.size == (12*32, 2*32)
    big = data.Split('poison', torch.zeros(3, 3, 224, 224, dtype=torch.uint8), ['a']*3, torch.zeros(3).long())
    assert max(Image.open(io.BytesIO(big._repr_png_())).size) <= 768


@pytest.mark.parametrize('kw, why', [
    (dict(image_size='64'), "'image_size' is '64'"), (dict(image_size=4), 'image_size is 4'),
    (dict(classes=33), 'classes is 33'), (dict(classes=1), 'classes is 1'),
    (dict(classes=-1), 'classes is -1'), (dict(classes='2'), "'classes' is '2'"),
    (dict(limit={'test': 3}), 'Unknown set in limit'),
    (dict(limit={'poison': 'all'}), "'limit.poison' is 'all'"), (dict(limit={'poison': 0}), 'limit.poison is 0'),
    (dict(limit={'poison': -5}), 'limit.poison is -5')])
def test_bad_parameters(photos, kw, why):
    "Pictograms and photographs refuse the same."
    for make, path in (pictogram_dataset, DATA/'glyphs'), (photo_dataset, photos):
        with pytest.raises(InvertuneError, match=why): make(path, **kw)


def test_unknown_set():
    with pytest.raises(InvertuneError, match="no set 'test'"): few()['test']


def test_balanced_takes_the_first_of_each_class():
    assert data._balanced([1, 1, 1, 0, 0, 0], 2) == [0, 3]
    assert data._balanced([0, 1, 0], 99) == [0, 1, 2]


# photographs

rng = np.random.default_rng(0)

def picture(path, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def tree(root, *folders, n=6, ending='png'):
    "Small pictures, `n` in each folder"
    for f in folders:
        for i in range(n): picture(root/f/f'{i:02}.{ending}', (8, 8))
    return root


PARTED = 'train/cat', 'train/dog', 'test/cat', 'test/dog'


@pytest.fixture
def photos(tmp_path):
    "30 small images of two classes, parted into train and test"
    for k in range(30):
        picture(tmp_path/'photos'/('train' if k < 20 else 'test')/('guinea_pig', 'fox')[k % 2]/f'{k:02}.png')
    return tmp_path/'photos'


def load(path, **kw): return photo_dataset(path, image_size=16, **kw)
def sizes(dataset): return [len(dataset[n]) for n in SETS]
def refused(path, why, **kw):
    with pytest.raises(InvertuneError, match=why): load(path, **kw)


def test_folder(photos):
    dataset = load(photos)
    assert dataset.classes == ['fox', 'guinea pig'] and sizes(dataset) == [10, 6, 4, 10]
    assert all(dataset.classes[y] in c for c, y in zip(dataset['poison'].captions, dataset['poison'].labels))
    assert_disjoint(dataset)


def test_same_deal_each_time(photos):
    assert assert_disjoint(load(photos)) == assert_disjoint(load(photos)) != assert_disjoint(load(photos, deal=1))


@pytest.mark.parametrize('limit', [{}, dict.fromkeys(SETS, 30)])
def test_no_set_is_in_the_order_of_its_classes(tmp_path, limit):
    "Folders are read class by class; a beginning of a set must be a fair sample all the same."
    dataset = load(tree(tmp_path/'x', *PARTED, 'train/owl', 'test/owl', n=60), limit=limit)
    for name in SETS: assert (torch.bincount(dataset[name].labels[:len(dataset[name])//2], minlength=3) >= 2).all()


def zipped(folder, path, top=''):
    with zipfile.ZipFile(path, 'w') as z:
        for f in sorted(folder.rglob('*.*')): z.write(f, top + f.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize('top', ['', 'top/', 'a/b/', './'])
def test_zip_is_the_same_as_the_folder(photos, tmp_path, top):
    assert assert_disjoint(load(zipped(photos, tmp_path/'photos.zip', top))) == assert_disjoint(load(photos))


@pytest.mark.parametrize('flat', ['', 'train/', 'Training/'])
def test_without_a_test_folder_a_fifth_is_set_apart(tmp_path, flat):
    root = tree(tmp_path/'flat', f'{flat}cat', f'{flat}dog', n=40)
    found = sizes(load(root))
    assert sum(found) == 80 and 6 <= found[3] <= 28 and min(found) > 0
    before = {n: set(map(bytes, map(np.ascontiguousarray, load(root)[n].images.numpy()))) for n in SETS}
    picture(root/f'{flat}cat'/'new.png', (8, 8))
    # none has moved
    assert before['evaluation'] <= set(map(bytes, map(np.ascontiguousarray, load(root)['evaluation'].images.numpy())))


def test_small_classes_have_a_test_image_too(tmp_path):
    assert (torch.bincount(load(tree(tmp_path/'flat', *'abcdefgh', n=12))['evaluation'].labels) >= 1).all()


def test_copies_are_dropped_and_evaluation_keeps_its_own(photos):
    (photos/'train'/'fox'/'copy.png').write_bytes(next((photos/'test'/'fox').iterdir()).read_bytes())
    dataset = load(photos)
    assert sizes(dataset) == [10, 6, 4, 10]
    assert_disjoint(dataset)


@pytest.mark.parametrize('train, test', [('train', 'valid'), ('train', 'Test'), ('TRAIN', 'Validation'),
                                         ('training', 'testing'), ('Train', 'eval'), ('train', 'dev')])
def test_names_of_the_parts(tmp_path, train, test):
    folders = [f'{train}/cat', f'{train}/dog', f'{test}/cat', f'{test}/dog']
    assert sizes(load(tree(tmp_path/'x', *folders))) == [6, 4, 2, 12]


def test_two_folders_to_test_on(tmp_path):
    assert sizes(load(tree(tmp_path/'x', *PARTED, 'val/cat', 'val/dog'))) == [6, 4, 2, 24]


@pytest.mark.parametrize('litter', ['train/cat/.ipynb_checkpoints/00-checkpoint.png', '.ipynb_checkpoints/a.png',
                                    '__MACOSX/train/cat/._00.png', 'train/cat/._00.png',
                                    'train/@eaDir/00.png/THUMB.jpg', 'train/.Trash-0/x.png', 'train/cat/Thumbs.db',
                                    'train/cat/.DS_Store', 'labels.csv', 'docs/README.md'])
def test_what_is_no_picture_of_ours(tmp_path, litter):
    root = tree(tmp_path/'x', *PARTED)
    if litter.endswith(('png', 'jpg')): picture(root/litter, (8, 8))
    else: (root/litter).parent.mkdir(exist_ok=True); (root/litter).write_text('x')
    for path in root, zipped(root, tmp_path/'x.zip'):
        dataset = load(path)
        assert dataset.classes == ['cat', 'dog'] and sizes(dataset) == [6, 4, 2, 12]


TOO_DEEP, LOOSE = 'lies in a folder too many', 'lies in no class folder'

@pytest.mark.parametrize('folders, why', [
    (['train/n01/images', 'train/n02/images', 'val/images'], TOO_DEEP),
    (['train/cat', 'train/dog/big', 'test/cat', 'test/dog/big'], TOO_DEEP),
    (['cat/train', 'cat/test', 'dog/train', 'dog/test'], TOO_DEEP), (['pets/cat', 'pets/dog', 'birds/owl'], TOO_DEEP),
    (['fold1/cat', 'fold2/cat'], TOO_DEEP),
    (['seg_train/cat', 'seg_test/cat'], TOO_DEEP), ([*PARTED, 'train'], LOOSE), ([*PARTED, 'test'], LOOSE),
    ([*PARTED, '.'], LOOSE), (['train', 'test'], LOOSE), (['train'], LOOSE),
    (['cat', 'dog', '.'], LOOSE), ([*PARTED, 'extra/cat'], "lies in 'extra', which is no part"),
    ([*PARTED, 'unlabeled'], "lies in 'unlabeled', which is no part"),
    (['train/cat', 'train/dog', 'vall/cat', 'vall/dog'], "'vall', which is no part"),
    (['test/cat', 'test/dog'], 'no folder train/'),
    (['train/cat', 'test/cat'], "one class, 'cat'"),
    ([*PARTED, 'train/owl'], "'owl' has 6 pictures to train on and 0 to test on"),
    ([*PARTED, 'test/owl'], "'owl' has 0 pictures to train on and 6 to test on"),
    (['train/Cat', 'train/dog', 'test/cat', 'test/dog'], "'Cat' and 'cat' are both called"),
    (['guinea_pig', 'guinea pig', 'fox'], "'guinea pig' and 'guinea_pig' are both called 'guinea pig'"),
    (['red  fox', 'red fox'], 'are both called'), (['Cat', 'cat'], 'are both called'),
    (['_', 'cat'], 'a name without letters')])
def test_folders_that_are_no_imagefolder(tmp_path, folders, why):
    root = tree(tmp_path/'x', *folders)
    refused(root, why)
    refused(zipped(root, tmp_path/'x.zip'), why)


def test_too_few_pictures(tmp_path):
    refused(tree(tmp_path/'x', *PARTED, n=1), "'cat' has 1 pictures to train on and 1 to test on.*needs 4 and 1")
    refused(tree(tmp_path/'y', *PARTED, n=3), "'cat' has 3 pictures")
    assert sizes(load(tree(tmp_path/'z', *PARTED, n=4))) == [4, 2, 2, 8]


def test_copies_are_not_counted(tmp_path):
    root = tree(tmp_path/'x', *PARTED)
    for f in (root/'test'/'dog').iterdir(): f.write_bytes((root/'test'/'cat'/f.name).read_bytes())
    refused(root, "'dog' has 6 pictures to train on and 0 to test on .copies left out")


def test_a_train_is_a_class_too(tmp_path):
    assert load(tree(tmp_path/'x', 'car', 'train', n=8)).classes == ['car', 'train']
    assert load(tree(tmp_path/'y', 'train/car', 'train/train', 'test/car', 'test/train')).classes == ['car', 'train']


def test_an_empty_class_folder(tmp_path):
    root = tree(tmp_path/'x', *PARTED)
    (root/'train'/'owl').mkdir()
    refused(root, 'train/owl lies among the class folders, but holds no picture')
    (root/'train'/'owl'/'notes.md').write_text('to do')
    refused(root, 'train/owl lies among')


@pytest.mark.parametrize('ending', ['txt', 'json', 'caption'])
def test_shards_are_no_classes(tmp_path, ending):
    root = tree(tmp_path/'x', '00000', '00001')
    for f in list(root.rglob('*.png')): f.with_suffix('.' + ending).write_text('a caption of its own')
    refused(root, f'00000/00.png has a caption of its own, 00000/00.{ending}')


# links

def test_linked_folders_and_files_are_read(tmp_path):
    root, store = tree(tmp_path/'x', 'train/cat', 'test/cat'), tree(tmp_path/'store', 'a', 'b')
    os.symlink(store/'a', root/'train'/'dog'), os.symlink(store/'b', root/'test'/'dog')
    (root/'train'/'cat'/'00.png').unlink()
    picture(store/'one.png', (8, 8))
    os.symlink(store/'one.png', root/'train'/'cat'/'00.png')
    assert load(root).classes == ['cat', 'dog'] and sizes(load(root)) == [6, 4, 2, 12]
    os.symlink(root, tmp_path/'link')
    assert sizes(load(tmp_path/'link')) == [6, 4, 2, 12]


@pytest.mark.parametrize('where', ['train/cat/99.png', 'train/owl', 'notes'])
def test_broken_link_is_named(tmp_path, where):
    root = tree(tmp_path/'x', *PARTED)
    os.symlink(tmp_path/'nowhere', root/where)
    refused(root, f'{where} cannot be read')


def test_links_in_a_circle_end(tmp_path):
    root = tree(tmp_path/'x', *PARTED)
    os.symlink(root, root/'train'/'cat'/'again')
    assert sizes(load(root)) == [6, 4, 2, 12]
    (root/'one').mkdir(), (root/'two').mkdir()
    os.symlink(root/'one', root/'two'/'link'), os.symlink(root/'two', root/'one'/'link')
    assert sizes(load(root)) == [6, 4, 2, 12]


def test_changed_photo_is_read_again(photos):
    before = assert_disjoint(load(photos))
    Image.new('RGB', (9, 9), 'red').save(photos/'train'/'fox'/'01.png')
    assert assert_disjoint(load(photos)) != before


# files

@pytest.mark.parametrize('ending', ['jpg', 'JPG', 'jpeg', 'jfif', 'webp', 'bmp', 'gif', 'ppm', 'pgm', 'tif', 'TIFF'])
def test_endings(tmp_path, ending):
    root = tmp_path/'x'
    for f in PARTED:
        for i in range(6):
            (root/f).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root/f/f'{i}.{ending}')
    assert sizes(load(root)) == [6, 4, 2, 12]


@pytest.mark.parametrize('damage', [lambda b: b'no image', lambda b: b[:len(b)//2], lambda b: b'',
                                    lambda b: b'<html>404</html>'])
@pytest.mark.parametrize('name', ['01.png', '01.heic'])
def test_unreadable_image_is_named(photos, damage, name):
    content = (photos/'train'/'fox'/'01.png').read_bytes()
    (photos/'train'/'fox'/'01.png').unlink()
    (photos/'train'/'fox'/name).write_bytes(damage(content))
    refused(photos, f'train/fox/{name} cannot be read')


def read(im, form='PNG', **kw):
    "A picture through a file, as a photograph at 16 pixels"
    file = io.BytesIO()
    im.save(file, form, **kw)
    return data._read_photo(data._Photo('cat', 'train', 'x', ''), lambda _: file.getvalue(), 16)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)

@pytest.mark.parametrize('form', ['PNG', 'PPM', 'TIFF'])
def test_sixteen_bits_are_the_same_picture(form):
    deep = read(Image.fromarray(RAMP.astype(np.uint16)*257), form)
    assert (deep == RAMP).all() and (deep == read(Image.fromarray(RAMP))).all()


def test_big_endian_sixteen_bits():
    im = Image.frombytes('I;16B', (16, 16), (RAMP.astype('>u2')*257).tobytes())
    assert (np.asarray(data._eight_bits(im, 'TIFF')) == RAMP[:, :, None]).all()


@pytest.mark.parametrize('pixels', [RAMP.astype(np.float32), RAMP.astype(np.int32)])
def test_unknown_white_is_refused(pixels):
    with pytest.raises(InvertuneError, match='which one is white is not said'): read(Image.fromarray(pixels), 'TIFF')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'CMYK', 'L', 'LA', '1'])
def test_modes(mode):
    "The same gray, however it is stored"
    gray = 255 if mode == '1' else 120
    im = Image.new('RGB', (16, 16), (gray,)*3).convert(mode, palette=Image.Palette.ADAPTIVE)
    assert abs(read(im, 'TIFF' if mode == 'CMYK' else 'PNG').astype(int) - gray).max() <= 3


def test_turned_as_the_camera_says():
    im = Image.new('RGB', (16, 16), 'black')
    im.paste('white', (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert read(im)[0, 2].mean() == 255 and read(im, exif=exif)[0, 2].mean() == 0


# archives

def raw_zip(folder, path, name=lambda n: n, change=bytes):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for f in sorted(folder.rglob('*.*')):
            info = zipfile.ZipInfo('x')
            info.filename = name(f.relative_to(folder).as_posix())
            z.writestr(info, f.read_bytes())
    path.write_bytes(change(path.read_bytes()))
    return path


def flagged(content):
    "The headers of a .zip, saying that every file is encrypted"
    content = bytearray(content)
    for mark, at in (b'PK\3\4', 6), (b'PK\1\2', 8):
        i = content.find(mark)
        while i >= 0:
            content[i+at] |= 1
            i = content.find(mark, i+4)
    return bytes(content)


def test_zip_with_a_password(photos, tmp_path):
    refused(raw_zip(photos, tmp_path/'x.zip', change=flagged), 'png in .*x.zip is locked with a password')


def test_zip_of_windows(photos, tmp_path):
    assert sizes(load(raw_zip(photos, tmp_path/'x.zip', lambda n: n.replace('/', '\\')))) == [10, 6, 4, 10]


def test_zip_cut_short(photos, tmp_path):
    refused(raw_zip(photos, tmp_path/'x.zip', change=lambda b: b[:-200]), 'not a readable .zip')


def test_zip_with_a_damaged_member(photos, tmp_path):
    def flip(content):
        i = content.find(b'\x89PNG')
        i = len(content)//2 if i < 0 else i + 100
        return content[:i] + bytes([content[i] ^ 255]) + content[i+1:]
    refused(raw_zip(photos, tmp_path/'x.zip', change=flip), 'png cannot be read')


def test_no_photos(tmp_path):
    refused(tmp_path/'nowhere', 'no photographs at .*nowhere: name an ImageFolder')
    (tmp_path/'empty').mkdir()
    refused(tmp_path/'empty', r'holds no pictures \(\.jpg.*name an ImageFolder')
    (tmp_path/'x.zip').write_bytes(b'no zip')
    refused(tmp_path/'x.zip', 'not a readable .zip')


# what a class is called

WNIDS = 'train/n01440764', 'train/n02102040', 'test/n01440764', 'test/n02102040'

def test_names_that_are_no_words_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="'n01440764' are no words.*classes.txt"): load(tree(tmp_path/'x', *WNIDS))
    with pytest.warns(UserWarning, match="'00001' are no words"): load(tree(tmp_path/'y', '00001', '00002', n=8))


@pytest.mark.parametrize('text', ['n01440764\ttench\nn02102040\tEnglish springer\n',
                                  'n02102040 English springer\r\nn01440764   tench\r\n', 'tench\nEnglish springer\n',
                                  '\ufeffn01440764 tench\nn02102040 English springer\n\n',
                                  'n01440764 tench\nn02102040 English springer\nn09999999 a class that is not here\n'])
@pytest.mark.filterwarnings('error')
def test_names_from_a_file(tmp_path, text):
    root = tree(tmp_path/'x', *WNIDS)
    (root/'classes.txt').write_text(text, encoding='utf-8', newline='')
    for path in root, zipped(root, tmp_path/'x.zip'), zipped(root, tmp_path/'y.zip', 'top/'):
        dataset = load(path)
        assert dataset.classes == ['tench', 'English springer']
        assert all(dataset.classes[y] in c for c, y in zip(dataset['poison'].captions, dataset['poison'].labels))


@pytest.mark.filterwarnings('error')
def test_names_beside_the_folder(tmp_path):
    root = tree(tmp_path/'x', *WNIDS)
    (tmp_path/'classes.txt').write_text('n01440764 tench\nn02102040 English springer\n')
    assert load(root).classes == ['tench', 'English springer']


def test_a_file_about_something_else_is_not_read(tmp_path):
    "Beside the folder there may be the names of another data set; only a file that names our folders counts."
    (tmp_path/'classes.txt').write_text('airplane\nship\n')
    assert load(tree(tmp_path/'x', *PARTED)).classes == ['cat', 'dog']
    (tmp_path/'x'/'train'/'cat'/'classes.txt').write_text('labelling tools leave one in a class folder\n')
    assert load(tmp_path/'x').classes == ['cat', 'dog']


@pytest.mark.parametrize('text, why', [
    ('n01440764 tench\n', "1 lines for 2 class folders, and says nothing of 'n02102040'"), ('tench\n', '1 lines for 2'),
    ('a\nb\nc\n', '3 lines for 2'), ('', 'is empty'),
    ('n01440764 tench\nspringer\n', "says nothing of 'n02102040'"),
    ('n01440764 crane\nn02102040 Crane\n', "both called 'Crane'")])
def test_names_that_do_not_fit(tmp_path, text, why):
    root = tree(tmp_path/'x', *WNIDS)
    (root/'classes.txt').write_text(text)
    refused(root, why)


def test_the_first_classes_are_those_of_the_first_folders(tmp_path):
    root = tree(tmp_path/'x', 'a', 'b', 'c', n=8)
    (root/'classes.txt').write_text('c zebra\na yak\nb ant\n')
    assert load(root, classes=2).classes == ['yak', 'ant']


def test_one_name_in_two_alphabets(tmp_path):
    "A Mac writes é as two characters; it is the same class."
    one, two = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    assert one != two
    dataset = load(tree(tmp_path/'x', f'train/{one}', 'train/dog', f'test/{two}', 'test/dog'))
    assert dataset.classes == [one, 'dog'] and sizes(dataset) == [6, 4, 2, 12]


def test_templates_of_the_caller(photos, tmp_path):
    (tmp_path/'t.txt').write_text('a drawing of a {}\n')
    dataset = load(photos, templates=read_templates(tmp_path/'t.txt'))
    assert dataset.templates == ['a drawing of a {}']
    assert set(dataset['poison'].captions) == {'a drawing of a fox', 'a drawing of a guinea pig'}


@pytest.mark.skipif('INVERTUNE_PHOTOS' not in os.environ, reason='no photographs here: set INVERTUNE_PHOTOS')
def test_real_photographs():
    dataset = photo_dataset(os.environ['INVERTUNE_PHOTOS'])
    assert_disjoint(dataset)
    for name in SETS:
        n = torch.bincount(dataset[name].labels)
        assert len(n) == len(dataset.classes) and n.max() - n.min() <= max(2, .02*n.max())
        assert dataset[name].images.float().std() > 30
