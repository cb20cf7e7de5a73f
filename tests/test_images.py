"Any folder of images becomes what a defender needs; what would make an answer meaningless is one sentence."
import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from invertune import images as module
from invertune.data import Split
from invertune.defender import Case, Defender
from invertune.images import _check_reading, _named_classes, _rgb, make_defender
from invertune.model import tiny_clip
from invertune.runtime import InvertuneError

NAMES = ['sun', 'key']


def says(sentence): return pytest.raises(InvertuneError, match=sentence)
def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(picture, form='PNG', **kw):
    "The bytes of a picture's file."
    file = io.BytesIO()
    picture.save(file, form, **kw)
    return file.getvalue()


@pytest.fixture(scope='module')
def clip(): return tiny_clip(image_size=32, width=4, text_width=32, text_layers=1, embed_dim=32, context=16)


def fill_folder(folder, n=64, side=24):
    "A folder of different pictures."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(noise(side, side + 4, 3, seed=i)).save(folder/f'{i:03}.png')
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return fill_folder(tmp_path_factory.mktemp('images')/'good')


ODD = dict(  # file -> how the middle of it is read; None: it is not
    gray=(saved(Image.new('L', (20, 20), 77)), (77, 77, 77)),
    one_bit=(saved(Image.new('1', (20, 20), 1)), (255, 255, 255)),
    palette=(saved(Image.new('RGB', (20, 20), 'red').quantize(4)), (255, 0, 0)),
    sixteen_bits=(saved(Image.fromarray(np.full((20, 20), 200*256, np.uint16))), (200, 200, 200)),
    cmyk=(saved(Image.new('CMYK', (20, 20)), 'JPEG'), (255, 255, 255)),
    transparent=(saved(Image.new('RGBA', (20, 20), (9, 9, 9, 0))), (255, 255, 255)),
    gray_alpha=(saved(Image.new('LA', (20, 20), (0, 0))), (255, 255, 255)),
    key_colour=(saved(Image.new('RGB', (20, 20), (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    animated=(saved(Image.new('RGB', (20, 20), 'red'), 'GIF', save_all=True, append_images=[Image.new('RGB', (20, 20), 'blue')]),
              (254, 0, 0)),
    webp=(saved(Image.new('RGB', (20, 20), 'white'), 'WEBP', lossless=True), (255, 255, 255)),
    floats=(saved(Image.fromarray(np.ones((20, 20), np.float32)), 'TIFF'), None),
    one_pixel=(saved(Image.new('RGB', (1, 1))), None),
    thread=(saved(Image.new('RGB', (8, 500))), None),
    huge=(saved(Image.new('1', (12_000, 12_000))), None),
    truncated=(saved(Image.fromarray(noise(64, 64, 3)))[:500], None),
    text=(b'not a picture', None),
    empty=(b'', None),
    html=(b'<html><script>alert(1)</script></html>', None),
    svg=(b'<svg xmlns="http://www.w3.org/2000/svg"/>', None))


@pytest.mark.parametrize('kind', ODD)
def test_pictures_of_every_kind(kind):
    data, middle = ODD[kind]
    if middle is None:
        with pytest.raises(Exception): _rgb(data)
        return
    im = _rgb(data)
    assert im.mode == 'RGB' and max(abs(a - b) for a, b in zip(im.getpixel((10, 10)), middle)) <= 2


def test_a_camera_turns_its_pictures():
    exif = Image.Exif()
    exif[0x112] = 6
    assert _rgb(saved(Image.new('RGB', (30, 20)), 'JPEG', exif=exif)).size == (20, 30)


def test_images_are_prepared_as_the_model_does(clip):
    "The same bytes as open_clip's own transform, whatever the shape."
    from open_clip import image_transform
    own = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    for size in (32, 32), (50, 33), (33, 51), (300, 40), (9, 9):
        im = Image.fromarray(noise(*size, 3))
        assert torch.equal(module._transform(clip)(im), (own(im)*255).round().byte())


def test_a_folder(folder, clip):
    "No order, no labels; the same seed draws the same."
    one, notes = make_defender(folder, clip, NAMES)
    assert one.images.shape == (64, 3, 32, 32) and one.images.dtype == torch.uint8 and 'are few' in notes[0]
    two, _ = make_defender(str(folder), clip, NAMES)
    other, _ = make_defender(folder, clip, NAMES, seed=1)
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, other.images)


def test_what_cannot_be_read_is_counted_and_named(tmp_path, clip):
    good = fill_folder(tmp_path/'a'/'deep')
    for name, (data, middle) in ODD.items():
        if middle is None: (good/f'{name}.jpg').write_bytes(data)
    (tmp_path/'a'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    os.mkfifo(tmp_path/'a'/'pipe.png')
    (tmp_path/'a'/'.ipynb_checkpoints').mkdir()
    (tmp_path/'a'/'.ipynb_checkpoints'/'x.png').write_bytes(b'')
    (tmp_path/'a'/'._x.png').write_bytes(b'')
    made, notes = make_defender(tmp_path/'a', clip, NAMES)
    assert len(made.images) == 64 and notes[0].startswith('10 of 74 pictures cannot be read, such as ')


def test_links_in_circles_are_entered_once(tmp_path, clip):
    good = fill_folder(tmp_path/'a'/'b')
    for i in range(12): (good/f'up{i}').symlink_to(tmp_path/'a')
    (tmp_path/'a'/'again').symlink_to(good)
    assert len(module._walk(tmp_path/'a')) == 64 and len(make_defender(tmp_path/'a', clip, NAMES)[0].images) == 64


def test_mostly_unreadable_is_the_wrong_folder(tmp_path, clip):
    for i in range(3000): (tmp_path/f'{i}.jpg').write_bytes(b'x')
    fill_folder(tmp_path, 10)
    with says(r'pictures cannot be read, such as .* \(no picture that Pillow knows\); is it the right folder'):
        make_defender(tmp_path, clip, NAMES)


def test_a_zip(tmp_path, folder, clip):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for p in sorted(folder.iterdir()): z.write(p, f'x/{p.name}')
        z.writestr('__MACOSX/._1.png', b''); z.writestr('x/notes.txt', b'')
    made, notes = make_defender(tmp_path/'a.zip', clip, NAMES)
    assert len(made.images) == 64 and len(notes) == 1


def test_a_bomb_is_not_unpacked(tmp_path, folder, clip, monkeypatch):
    "What says that it is too large is passed over unread."
    monkeypatch.setattr(module, '_MOST_BYTES', 2**20)
    with zipfile.ZipFile(tmp_path/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for p in sorted(folder.iterdir()): z.write(p, p.name)
        z.writestr('bomb.png', bytes(2**21))
    assert '1 of 65 pictures cannot be read, such as bomb.png (2 MB are too many)' in make_defender(tmp_path/'a.zip', clip, NAMES)[1][0]


def test_places_that_are_none(tmp_path, clip):
    (tmp_path/'empty').mkdir(); (tmp_path/'a.zip').write_bytes(b'PK no'); (tmp_path/'one.png').write_bytes(b'')
    (tmp_path/'text').mkdir(); (tmp_path/'text'/'a.txt').write_text('x')
    for name, sentence in dict(none='there is no folder', empty='holds no pictures', text='holds no pictures',
                               **{'a.zip': 'no readable .zip', 'one.png': 'neither a folder nor a .zip'}).items():
        with says(sentence): make_defender(tmp_path/name, clip, NAMES)


def test_too_few_and_copies(tmp_path, clip):
    with says('has 20 images that can be used, but 64 are the least'): make_defender(fill_folder(tmp_path/'a', 20), clip, NAMES)
    x = torch.from_numpy(noise(70, 3, 32, 32))
    made, notes = make_defender(torch.cat([x, x[:9]]), clip, NAMES)
    assert len(made.images) == 70 and notes[0] == '9 of 79 images are copies of others: they are left out'
    with says('1 images that can be used'): make_defender(x[:1].repeat(99, 1, 1, 1), clip, NAMES)
    with says('a limit of 5 images is too low'): make_defender(x, clip, NAMES, limit=5)


def test_tensors_and_data_sets(clip):
    x = torch.from_numpy(noise(70, 3, 40, 40))
    same = lambda source: make_defender(source, clip, NAMES)[0].images
    want = same(x)
    assert torch.equal(want, same(x.float()/255)) and torch.equal(want, same([(im, 3) for im in x]))
    assert torch.equal(want, same([Image.fromarray(im.permute(1, 2, 0).numpy()) for im in x]))
    assert torch.equal(want, same(Split('own', x, ['']*70, torch.zeros(70).long())))
    own = Defender(want, ['']*70, NAMES, ['a {}'])
    assert make_defender(own, clip) == (own, [])


@pytest.mark.parametrize('source, sentence', [
    (torch.randn(70, 3, 32, 32), 'before mean and std'), (torch.full((70, 3, 32, 32), torch.nan), 'floats must lie'),
    (torch.zeros(70, 3, 32, 32)+300, 'images hold values from 300 to 300'), (torch.zeros(70, 32, 32, 3).byte(), 'needed'),
    (torch.zeros(70, 1, 32, 32).byte(), r'has the shape \[1, 32, 32\]'), (torch.zeros(70, 3, 32, 32).int(), 'int32'),
    (torch.zeros(0, 3, 32, 32), 'the data set is empty'), ([], 'the data set is empty'), (7, 'images are a int'),
    (iter([]), 'with a length is needed')])
def test_images_that_are_none(clip, source, sentence):
    with says(sentence): make_defender(source, clip, NAMES)


@pytest.mark.parametrize('text, names', [
    ('cat\ndog\n', ['cat', 'dog']), ('\ufeffcat\r\n\r\n dog \r\n', ['cat', 'dog']), ('0: cat\n1: dog', ['cat', 'dog']),
    ('n00000001 cat\nn00000002 dog', ['cat', 'dog']), ('a\tcat\nb\tdog', ['cat', 'dog']), ('["cat", "dog"]', ['cat', 'dog']),
    ('{"1": "dog", "0": "cat"}', ['cat', 'dog']), ('{"0": ["n1", "cat"], "1": ["n2", "dog"]}', ['cat', 'dog']),
    ('{"dog": 1, "cat": 0}', ['cat', 'dog']), ('кошка\n犬', ['кошка', '犬']), ('cafe\u0301\nthé', ['café', 'thé']),
    ('7 Up\ncola', ['7 Up', 'cola'])])
def test_files_of_names(tmp_path, text, names):
    (tmp_path/'names').write_bytes(text.encode())
    assert _named_classes(tmp_path/'names', None, None)[0] == names


@pytest.mark.parametrize('text, sentence', [
    (b'', 'is empty'), (b'\n \n', 'is empty'), (b'cat', '1 names, but 2'), (b'cat\ncat', "1 and 2 are both 'cat'"),
    (b'cat\nCAT', 'are both'), ('café\ncafe\u0301'.encode(), 'are both'), (b'\xff\xfe\x00', 'cannot be read'),
    (b'cat\n' + b'x'*500, 'name 2 has 500 characters'), (b'cat\nd\x00g', 'cannot be printed'), (b'["cat", "dog"', 'is none'),
    (b'{"cat": {"a": 1}}', 'no list of names'), (b'["cat", 5]', 'name 2 is 5'), (b'["cat", ""]', "name 2 is ''"),
    (b'[' * 100_000, 'is none'), (b'{"0": "a", "1": null}', 'name 2 is None')])
def test_files_of_names_that_are_none(tmp_path, text, sentence):
    (tmp_path/'names').write_bytes(text)
    with says(sentence): _named_classes(tmp_path/'names', None, None)


def test_names_in_python():
    assert _named_classes(('a', 'b'), None, None) == (['a', 'b'], ['a photo of a {}'])
    names, prompts = _named_classes(None, None, None)
    assert len(names) == len(set(map(str.casefold, names))) == 998 and len(prompts) == 7
    assert len(_named_classes(None, 'cifar10', ['a {}'])[0]) == 10
    with says('not both'): _named_classes(['a', 'b'], 'cifar10', None)
    with says("Unknown data set 'imagenette': did you mean 'imagenet'"): _named_classes(None, 'imagenette', None)
    with says('not a dict'): _named_classes({'a': 1}, None, None)
    with says('there is no file'): _named_classes('cat', None, None)


def test_every_property_of_a_json_that_is_not_names():
    "Whatever JSON holds, there are names or a sentence."
    rng = np.random.default_rng(0)
    def value(deep):
        k = rng.integers(6 if deep else 4)
        if k == 4: return [value(deep-1) for _ in range(rng.integers(4))]
        if k == 5: return {str(rng.integers(9)): value(deep-1) for _ in range(rng.integers(4))}
        return [None, int(rng.integers(9)), 'x'*int(rng.integers(5)), True][k]
    for _ in range(300):
        try: names = module._checked_names(module._json_names(json.loads(json.dumps(value(3))), 'f'), 'f')
        except InvertuneError: continue
        assert all(isinstance(n, str) and n for n in names)


def test_a_model_that_reads_is_let_pass(small):
    d = small.defender
    assert _check_reading(Case(small.bad, d)) == []
    more = Defender(d.images, d.captions, [*d.classes, 'zebra', 'truck'], d.templates)
    assert 'names are read in no image' in _check_reading(Case(small.bad, more))[0]


def test_what_gives_no_verdict_is_refused(small, clip):
    d = small.defender
    def ask(model=small.bad, images=d.images, names=d.classes):
        return _check_reading(Case(model, Defender(images, ['']*len(images), names, ['a {}'])))
    with says('the same of all images'): ask(clip)
    with says('the same of all images'): ask(images=torch.from_numpy(noise(64, 3, 32, 32)))
    with says('words that mean nothing fit'): ask(names=['zebra', 'truck', 'violin', 'lamp', 'spoon'])
    with says('2 class names are too few for a verdict'): ask(names=['heart', 'sun'])
    reads = Case(small.bad, d)
    one = reads.images[reads.reads == 0][:32]
    with says('of the images are read as|do not divide|the same of all'): ask(images=one)
