"What a defender has is looked at before anything is computed; a case deals it into parts that share nothing."
import copy
from dataclasses import fields

import pytest
import torch

from invertune.attacks import DEMO, demo_split
from invertune.defender import Case, Defender
from invertune.metrics import embed
from invertune.model import Clip, tiny_clip
from invertune.runtime import InvertuneError

NAMES = list(DEMO)


@pytest.fixture(scope='module')
def own(): return demo_split(48, 10**6)


@pytest.fixture(scope='module')
def clip(): return tiny_clip(image_size=32, width=4, text_width=32, text_layers=1, embed_dim=32, context=8).eval()


def make(own, images=None, captions=None, classes=NAMES, templates=('a {}',)):
    images = own.images if images is None else images
    return Defender(images, own.captions if captions is None else captions, classes, templates)


IMAGES = {
    'numpy array': (lambda x: x.numpy(), 'one torch tensor, not a ndarray'),
    'list': (lambda x: list(x), 'of a list of equal tensors by torch.stack'),
    'channels last': (lambda x: x.permute(0, 2, 3, 1), 'the channels come last'),
    'RGBA': (lambda x: torch.cat([x, x[:, :1]], 1), r'\[48, 4, 32, 32\], but \[N,3,side,side\] is needed'),
    'one image': (lambda x: x[0], r'the shape \[3, 32, 32\]'),
    'not square': (lambda x: x[..., :24], '32 pixels high and 24 wide'),
    'floats': (lambda x: x / 255, r'images are float32, .*\(255\*images\).round\(\).byte\(\)'),
    'normalised': (lambda x: (x / 255 - .45) / .27, 'after undoing any mean and std'),
    'half': (lambda x: (x / 255).half(), 'images are float16'),
    'int16': (lambda x: x.short(), 'images are int16'),
    'int64': (lambda x: x.long(), 'images are int64')}


@pytest.mark.parametrize('what', IMAGES)
def test_images_that_are_refused(own, what):
    change, sentence = IMAGES[what]
    with pytest.raises(InvertuneError, match=sentence): make(own, change(own.images))


@pytest.mark.parametrize('n', [0, 1, 2, 8, 15])
def test_too_few_images(own, n):
    with pytest.raises(InvertuneError, match=f'{n} images are too few'): make(own, own.images[:n], own.captions[:n])
    assert len(make(own, own.images[:16], own.captions[:16]).images) == 16


TEXTS = {
    'one string for the names': (dict(classes='heart'), 'class names must be a list of strings, not a str'),
    'a dict for the names': (dict(classes=dict(enumerate(NAMES))), 'not a dict'),
    'no names': (dict(classes=[]), '0 class names: at least 2 are needed'),
    'one name': (dict(classes=['heart']), '1 class names: at least 2 are needed'),
    'a name twice': (dict(classes=[*NAMES, 'heart']), "'heart' is twice among the class names"),
    'an empty name': (dict(classes=[*NAMES, ' ']), "non-empty strings, but ' ' is among them"),
    'None for a name': (dict(classes=[*NAMES, None]), 'non-empty strings, but None is among them'),
    'numbers for names': (dict(classes=[0, 1, 2]), 'non-empty strings, but 0 is among them'),
    'no templates': (dict(templates=[]), '0 templates: at least 1'),
    'one string for the templates': (dict(templates='a {}'), 'templates must be a list of strings, not a str'),
    'functions for templates': (dict(templates=[lambda c: f'a {c}']), 'not functions'),
    'no place for the name': (dict(templates=['a photo']), "'a photo' has 0 places"),
    'two places': (dict(templates=['a {} {}']), "has 2 places '{}' for the class name"),
    'another place': (dict(templates=['a {c}']), 'has 0 places'),
    'one string for the captions': (dict(captions='a heart'), 'captions must be a list of strings'),
    'numbers for captions': (dict(captions=[1] * 48), 'captions must be a list of strings')}


@pytest.mark.parametrize('what', TEXTS)
def test_texts_that_are_refused(own, what):
    given, sentence = TEXTS[what]
    with pytest.raises(InvertuneError, match=sentence): make(own, **given)


@pytest.mark.parametrize('n', [47, 49])
def test_each_image_needs_its_caption(own, n):
    with pytest.raises(InvertuneError, match=f'48 images, but {n} captions'): make(own, captions=(own.captions*2)[:n])


def test_no_room_for_a_secret(own):
    allowed = {'images', 'captions', 'classes', 'templates'}
    assert {f.name for f in fields(Defender)} == allowed == vars(make(own)).keys()
    with pytest.raises(TypeError): Defender(own.images, own.captions, NAMES, ['a {}'], target='umbrella')


def test_index(own):
    assert make(own).index('sun') == NAMES.index('sun')
    with pytest.raises(InvertuneError, match="'unicorn' is none of the 6 classes"): make(own).index('unicorn')


# A case

def test_parts_share_nothing_and_leave_nothing_out(own, clip):
    case = Case(clip, make(own))
    parts = torch.cat([case.fit, case.select, case.test])
    assert (len(case.fit), len(case.select), len(case.test)) == (24, 12, 12) and torch.equal(parts, case.images)
    rows = lambda x: sorted(map(tuple, x.flatten(1).tolist()))
    assert rows(case.images) == rows(own.images) and not torch.equal(case.images, own.images)


def test_captions_stay_with_their_images(own, clip):
    case = Case(clip, make(own))
    caption = {tuple(x.flatten().tolist()): c for x, c in zip(own.images, own.captions)}
    assert case.captions == [caption[tuple(x.flatten().tolist())] for x in case.images]


def test_sorted_images_do_no_harm(own, clip):
    "Every part shows classes from the whole of a folder that comes sorted."
    many = demo_split(240, 10**6)
    order = many.labels.argsort(stable=True)
    case = Case(clip, Defender(many.images[order], [many.captions[i] for i in order], NAMES, ['a {}']))
    at = {n: len(set(case.captions[part])) for n, part in case._parts.items()}
    assert at == dict(fit=6, select=6, test=6)


def test_the_seed_deals(own, clip):
    one, again, other = (Case(clip, make(own), seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)


def test_computed_once(own, clip, monkeypatch):
    "Head and embeddings are those of the model, and asked for a second time they cost nothing."
    case = Case(clip, make(own))
    head, f = case.head, case.embeddings
    assert torch.equal(f, embed(clip, case.images)) and head.shape == (6, 32) and len(case.reads) == 48
    monkeypatch.setattr(Clip, 'encode_image', lambda *a: 1/0)
    monkeypatch.setattr(Clip, 'encode_text', lambda *a: 1/0)
    assert case.head is head and case.embeddings is f
    images, clean, read = case.part('select', 5)
    assert torch.equal(images, case.select[:5]) and torch.equal(clean, f[24:29])
    assert torch.equal(read, (clean @ head.T).argmax(1))


def test_images_of_another_size(own):
    large = tiny_clip(image_size=64, width=4)
    with pytest.raises(InvertuneError, match='images of 64 pixels a side, but those of the defender have 32'):
        Case(large, make(own))


def test_a_broken_model(own, clip):
    "NaN for every image, for one alone, and for class names."
    broken = copy.deepcopy(clip)
    with torch.no_grad():
        for m in broken.model.visual.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.running_var.neg_()
    with pytest.raises(InvertuneError, match='for 16 of 16 embeddings of images'): Case(broken, make(own))
    mute = copy.deepcopy(clip)
    with torch.no_grad(): mute.model.text_projection.fill_(torch.nan)
    with pytest.raises(InvertuneError, match='embeddings of class names'): Case(mute, make(own)).head


def test_one_image_that_a_model_breaks_on(own, clip, monkeypatch):
    case, encode, last = Case(clip, make(own)), Clip.encode_image, make(own).images[0]
    def nan_for_one(self, x):
        hit = (x == last / 255).flatten(1).all(1)
        return encode(self, x).masked_fill(hit[:, None], torch.nan)
    monkeypatch.setattr(Clip, 'encode_image', nan_for_one)
    with pytest.raises(InvertuneError, match='for 1 of 48 embeddings of images'): case.embeddings
