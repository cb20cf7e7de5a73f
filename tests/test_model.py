"A checkpoint is whole, ours and finite, or it is refused with a sentence; training stops where its loss is no number."
import errno
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from invertune import runtime
from invertune.model import Activations, load_clip, named_layers, pixels, pretrained_clip, save_clip, tiny_clip, write_tensors, zero_shot_head
from invertune.runtime import InvertuneError
from invertune.train import train_clip

TINY = dict(image_size=32, width=8, text_width=32, text_layers=1, embed_dim=32, context=8)


@pytest.fixture(scope='module')
def clip(): return tiny_clip(**TINY).eval()


@pytest.fixture
def file(clip, tmp_path):
    save_clip(clip, tmp_path/'model.safetensors')
    return tmp_path/'model.safetensors'


def weights(clip): return {k: v.clone().contiguous() for k, v in clip.model.state_dict().items()}


@pytest.mark.parametrize('tower', ['resnet', 'vit'])
def test_round_trip(tower, tmp_path):
    clip, x = tiny_clip(tower, **TINY).eval(), torch.rand(2, 3, 32, 32)
    save_clip(clip, tmp_path/'model.safetensors', attack='badnet')
    again = load_clip(tmp_path/'model.safetensors')
    x, tokens = x.to(clip.device), clip.tokenize(['an anchor', 'a heart'])
    with torch.no_grad():
        for one, other in zip(clip(x, tokens), again(x, tokens)): assert torch.equal(one, other)
    assert not again.training and again.config == clip.config


@pytest.mark.parametrize('kept', [0, 7, 100, .5, -1])
def test_truncated(file, kept):
    content = file.read_bytes()
    file.write_bytes(content[:int(kept*len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(InvertuneError, match='not a whole safetensors file'): load_clip(file)


class Code:
    "A pickle that runs a command when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


def test_pickled(tmp_path):
    "A pickled checkpoint is refused, and nothing in it is run."
    (tmp_path/'model.pt').write_bytes(pickle.dumps(Code(tmp_path/'ran')))
    with pytest.raises(InvertuneError, match='pickled checkpoints .* are not read'): load_clip(tmp_path/'model.pt')
    assert not (tmp_path/'ran').exists()


def test_missing(tmp_path):
    with pytest.raises(InvertuneError, match='run the stage that makes it'): load_clip(tmp_path/'model.safetensors')


UNREADABLE, UNBUILT = 'has no config', 'describes no model that can be built'

@pytest.mark.parametrize('header, sentence', [
    ({}, UNREADABLE), ({'config': 'tiny'}, UNREADABLE), ({'config': []}, UNREADABLE), ({'config': {}}, UNBUILT), ({'config': {'kind': 'huge'}}, UNBUILT),
    ({'config': {'kind': ['tiny']}}, UNBUILT), ({'config': {'kind': 'tiny', 'depth': 3}}, UNBUILT), ({'config': {'kind': 'tiny', 'width': '16'}}, UNBUILT),
    ({'config': {'kind': 'tiny', 'width': -1}}, UNBUILT), ({'config': {'kind': 'tiny', 'layers': [1]}}, UNBUILT),
    ({'config': {'kind': 'pretrained'}}, UNBUILT), ({'config': {'kind': 'pretrained', 'name': 'RN0'}}, UNBUILT)])
def test_foreign_config(tmp_path, header, sentence):
    write_tensors(tmp_path/'model.safetensors', {'w': torch.zeros(3)}, **header)
    with pytest.raises(InvertuneError, match=sentence): load_clip(tmp_path/'model.safetensors')


@pytest.mark.parametrize('header, sentence', [(None, UNREADABLE), ({'format': 'pt'}, UNREADABLE), ({'meta': '{"config": {"ki'}, 'header that is not JSON'), ({'meta': '3'}, 'header that is not JSON')])
def test_foreign_header(tmp_path, header, sentence):
    "Files of other programs"
    save_file({'w': torch.zeros(3)}, tmp_path/'model.safetensors', header)
    with pytest.raises(InvertuneError, match=sentence): load_clip(tmp_path/'model.safetensors')


def drop(w): del w['visual.conv1.weight']
def extra(w): w['visual.conv9.weight'] = torch.zeros(3)
def rename(w): w['image_encoder.conv1.weight'] = w.pop('visual.conv1.weight')
def reshape(w): w['visual.conv1.weight'] = w['visual.conv1.weight'][:, :2].contiguous()
def nan(w): w['visual.conv1.weight'][0, 0, 0, 0] = float('nan')
def inf(w): w['text_projection'][0, 0] = float('inf')


@pytest.mark.parametrize('damage, sentence', [
    (drop, r'1 keys missing .*visual.conv1.weight'), (extra, r'1 unknown .*visual.conv9.weight'), (rename, '1 keys missing .* 1 unknown'),
    (reshape, 'visual.conv1.weight has shape .*, the model wants'), (nan, 'visual.conv1.weight holds NaN'), (inf, 'text_projection holds NaN or infinity')])
def test_weights_that_do_not_fit(clip, tmp_path, damage, sentence):
    w = weights(clip)
    damage(w)
    write_tensors(tmp_path/'model.safetensors', w, config=clip.config)
    with pytest.raises(InvertuneError, match=sentence): load_clip(tmp_path/'model.safetensors')


def test_another_architecture(clip, tmp_path):
    "Weights of one model under the description of another"
    write_tensors(tmp_path/'model.safetensors', weights(clip), config=dict(clip.config, width=16))
    with pytest.raises(InvertuneError, match='the model wants'): load_clip(tmp_path/'model.safetensors')


def test_full_disk(clip, file, monkeypatch):
    "The earlier checkpoint is still the whole earlier checkpoint."
    before = file.read_bytes()
    def full(path): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(runtime, '_flush', full)
    with pytest.raises(InvertuneError, match='No space left on device.*untouched'): save_clip(tiny_clip(**TINY, seed=1), file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_training_that_diverges():
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=gen)
    with pytest.raises(InvertuneError, match='train, epoch .*: the loss became nan; lower the learning rate'):
        train_clip(tiny_clip(**TINY), images, ['an anchor', 'a heart']*16, epochs=5, lr=1e15, bs=16)


def test_training_pairs_that_are_none(clip):
    with pytest.raises(InvertuneError, match='2 images, but 1 captions'): train_clip(clip, torch.zeros(2, 3, 32, 32), ['a'], epochs=1, lr=1e-3)
    with pytest.raises(InvertuneError, match='too few'): train_clip(clip, torch.zeros(1, 3, 32, 32), ['a'], epochs=1, lr=1e-3)


def test_unknown_names(clip):
    with pytest.raises(InvertuneError, match="unknown tower 'mlp'"): tiny_clip('mlp')
    with pytest.raises(InvertuneError, match='has no .* for the class name'): zero_shot_head(clip, ['anchor'], ['a picture'])


def test_weights_that_are_not_here(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(InvertuneError, match="can't load 'RN0'"): pretrained_clip('RN0')


@pytest.mark.parametrize('tower', ['resnet', 'vit'])
def test_looking_leaves_no_trace(tower):
    "Hooks go when the look is over, also after an error; a look in eval mode moves no statistics."
    clip, x = tiny_clip(tower, **TINY).eval(), torch.rand(2, 3, 32, 32)
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        with Activations(clip) as acts:
            clip.encode_image(x.to(clip.device))
            1/0
    assert acts.out.keys() == named_layers(clip).keys() and not any(l._forward_hooks for l in named_layers(clip).values())
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())


def test_pixels():
    x = torch.tensor([0, 255], dtype=torch.uint8)
    assert pixels(x).tolist() == [0, 1] and x.tolist() == [0, 255]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu(tmp_path):
    "The whole path once on a GPU: train, save, read, embed."
    clip = tiny_clip(**TINY)
    assert clip.device.type == 'cuda'
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    train_clip(clip, images, ['an anchor', 'a heart']*16, epochs=1, lr=1e-3, bs=16)
    save_clip(clip, tmp_path/'model.safetensors')
    with torch.no_grad(): assert torch.allclose(load_clip(tmp_path/'model.safetensors').encode_image(pixels(images, clip.device)), clip.encode_image(pixels(images, clip.device)), atol=1e-5)
