"A checkpoint is whole, ours and finite, or it is refused with a sentence; training stops where its loss is no number."
import errno
import os
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import invertune.compat  # before open_clip
import open_clip
from invertune import runtime
from invertune.model import (MEAN, Activations, load_clip, named_layers, pixels, pretrained_clip, save_clip, tiny_clip,
                             Clip, write_tensors, zero_shot_head)
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
        for one, other in zip(clip(x, tokens), again(x, tokens)): assert torch.allclose(one, other, atol=1e-6)
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
    ({}, UNREADABLE), ({'config': 'tiny'}, UNREADABLE), ({'config': []}, UNREADABLE), ({'config': {}}, UNBUILT),
    ({'config': {'kind': 'huge'}}, UNBUILT),
    ({'config': {'kind': ['tiny']}}, UNBUILT), ({'config': {'kind': 'tiny', 'depth': 3}}, UNBUILT),
    ({'config': {'kind': 'tiny', 'width': '16'}}, UNBUILT),
    ({'config': {'kind': 'tiny', 'width': -1}}, UNBUILT), ({'config': {'kind': 'tiny', 'layers': [1]}}, UNBUILT),
    ({'config': {'kind': 'pretrained'}}, UNBUILT), ({'config': {'kind': 'pretrained', 'name': 'RN0'}}, UNBUILT),
    ({'config': {'kind': 'pretrained', 'name': 'hf-hub:someone/something'}}, UNBUILT),
    ({'config': {'kind': 'pretrained', 'name': 'local-dir:.'}}, UNBUILT),
    ({'config': {'kind': 'pretrained', 'name': 'RN50', 'weights': 'openai'}}, UNBUILT)])
def test_foreign_config(tmp_path, header, sentence):
    write_tensors(tmp_path/'model.safetensors', {'w': torch.zeros(3)}, **header)
    with pytest.raises(InvertuneError, match=sentence): load_clip(tmp_path/'model.safetensors')


@pytest.mark.parametrize('header, sentence',
                         [(None, UNREADABLE), ({'format': 'pt'}, UNREADABLE),
                          ({'meta': '{"config": {"ki'}, 'header that is not JSON'),
                          ({'meta': '3'}, 'header that is not JSON')])
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
    (drop, r'1 keys missing .*visual.conv1.weight'), (extra, r'1 unknown .*visual.conv9.weight'),
    (rename, '1 keys missing .* 1 unknown'),
    (reshape, 'visual.conv1.weight has shape .*, the model wants'), (nan, 'visual.conv1.weight holds NaN'),
    (inf, 'text_projection holds NaN or infinity')])
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
    with pytest.raises(InvertuneError, match='No space left on device.*untouched'):
        save_clip(tiny_clip(**TINY, seed=1), file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_training_that_diverges():
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=gen)
    with pytest.raises(InvertuneError, match='train, epoch .*: the loss became nan; lower the learning rate'):
        train_clip(tiny_clip(**TINY), images, ['an anchor', 'a heart']*16, epochs=5, lr=1e15, bs=16)


def test_training_pairs_that_are_none(clip):
    with pytest.raises(InvertuneError, match='2 images, but 1 captions'):
        train_clip(clip, torch.zeros(2, 3, 32, 32), ['a'], epochs=1, lr=1e-3)
    with pytest.raises(InvertuneError, match='too few'):
        train_clip(clip, torch.zeros(1, 3, 32, 32), ['a'], epochs=1, lr=1e-3)


def test_unknown_names(clip):
    with pytest.raises(InvertuneError, match="unknown tower 'mlp'"): tiny_clip('mlp')
    with pytest.raises(InvertuneError, match='needs one .* for the class name'):
        zero_shot_head(clip, ['anchor'], ['a picture'])


# random numbers

def draws(): return torch.rand(1).item(), np.random.rand(), random.random()

@pytest.mark.parametrize('act', ['build', 'read', 'published'])
def test_building_leaves_the_callers_random_numbers_alone(file, download, act):
    def seed(): torch.manual_seed(5); np.random.seed(5); random.seed(5)
    torch.use_deterministic_algorithms(False)
    seed(); expected = draws()
    seed()
    if act == 'build': tiny_clip(**TINY, seed=3)
    elif act == 'read': load_clip(file)
    else: published('ViT-S-32', download)
    assert draws() == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_seed_makes_the_model():
    torch.manual_seed(1)
    one = weights(tiny_clip(**TINY, seed=3))
    torch.manual_seed(2)
    assert all(torch.equal(v, one[k]) for k, v in weights(tiny_clip(**TINY, seed=3)).items())
    assert not torch.equal(weights(tiny_clip(**TINY, seed=4))['text_projection'], one['text_projection'])


# published models: no test fetches anything

@pytest.fixture(scope='module')
def download(tmp_path_factory):
    "A file of random weights, which stands for what open_clip would fetch"
    save_file({k: v.contiguous() for k, v in open_clip.create_model('ViT-S-32').state_dict().items()},
              path := tmp_path_factory.mktemp('hub')/'w.safetensors')
    return path


def published(name, file, tag=None, entry=None):
    "`pretrained_clip` of a tag, whose entry in open_clip's list is `entry`; without a tag, of the file"
    if not tag: return pretrained_clip(name, str(file))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(open_clip.factory, 'download_pretrained', lambda *_, **__: str(file))
        m.setattr(open_clip.factory, 'get_pretrained_cfg', lambda *_: entry)
        return pretrained_clip(name, tag)


def activation(clip): return type(clip.model.transformer.resblocks[0].mlp.gelu).__name__

@pytest.mark.parametrize('quick, expected', [(True, 'QuickGELU'), (False, 'GELU')])
def test_the_tag_decides_on_the_activation(download, tmp_path, quick, expected):
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'QuickGELU mismatch')
        clip = published('ViT-S-32', download, 'a_tag', {'quick_gelu': quick})
    assert activation(clip) == expected
    save_clip(clip, tmp_path/'model.safetensors')
    again, x = load_clip(tmp_path/'model.safetensors'), clip.tokenize(['a photo of a banana'])
    assert activation(again) == expected
    with torch.no_grad(): assert torch.allclose(again.encode_text(x), clip.eval().encode_text(x), atol=1e-6)


def test_every_tag_with_quick_gelu_gets_it(monkeypatch):
    "All pairs of name and tag that open_clip lists: what would be built computes as the weights were trained."
    asked = {}
    class Asked(Exception): pass
    def create_model(name, pretrained, force_quick_gelu, **_):
        asked[name, pretrained] = force_quick_gelu or open_clip.get_model_config(name).get('quick_gelu', False)
        raise Asked
    monkeypatch.setattr(open_clip, 'create_model', create_model)
    for name, tag in open_clip.list_pretrained():
        with pytest.raises(InvertuneError): pretrained_clip(name, tag)
    wants = {pair for pair in open_clip.list_pretrained() if open_clip.get_pretrained_cfg(*pair).get('quick_gelu')}
    assert len(asked) == len(open_clip.list_pretrained()) and ('RN50', 'openai') in wants
    assert all(asked[pair] for pair in wants)


def test_the_mean_of_the_tag_is_used_and_kept(download, tmp_path):
    other = dict(mean=(.5, .5, .5), std=(.25, .5, .5))
    clip = published('ViT-S-32', download, 'a_tag', other)
    save_clip(clip, tmp_path/'model.safetensors')
    again = load_clip(tmp_path/'model.safetensors')
    for c in clip, again:
        assert c.mean.flatten().tolist() == [.5, .5, .5] and c.std.flatten().tolist() == [.25, .5, .5]
    x = torch.rand(1, 3, 224, 224, device=clip.device)
    with torch.no_grad(): assert torch.allclose(again.encode_image(x), clip.eval().encode_image(x), atol=1e-6)


def test_a_file_without_a_mean_has_openais(clip, tmp_path):
    "As the files of earlier versions"
    write_tensors(tmp_path/'model.safetensors', weights(clip),
                  config={k: v for k, v in clip.config.items() if k not in ('mean', 'std')})
    assert torch.allclose(load_clip(tmp_path/'model.safetensors').mean.flatten().cpu(), torch.tensor(MEAN))


@pytest.mark.parametrize('change', [{'mean': [.5, .5]}, {'mean': 'gray'}, {'mean': [.5, .5, None]}, {'std': [0, 1, 1]},
                                    {'std': [1, 1, float('inf')]}, {'mean': [.5, .5, float('nan')]}, {'std': .5}])
def test_a_mean_that_is_none(clip, tmp_path, change):
    write_tensors(tmp_path/'model.safetensors', weights(clip), config={**clip.config, **change})
    with pytest.raises(InvertuneError, match=UNBUILT): load_clip(tmp_path/'model.safetensors')


@pytest.mark.parametrize('given, why', [
    (('RN50', ''), 'would be random: name a tag .*openai'), (('RN50', None), 'would be random'),
    (('RN50', 'openia'), "did you mean 'openai'"), (('RN0', 'openai'), 'Unknown architecture'),
    (('RN50', 'no/such/file.pt'), 'Unknown tag or file'), (('ViT-S-32', 'openai'), 'there are none')])
def test_weights_that_are_none(given, why):
    with pytest.raises(InvertuneError, match=why): pretrained_clip(*given)


def test_a_download_that_fails(monkeypatch):
    def offline(*_, **__): raise OSError('no network')
    monkeypatch.setattr(open_clip.factory, 'download_pretrained', offline)
    with pytest.raises(InvertuneError, match="can't load 'RN50' with weights 'openai'.*no network"): pretrained_clip()


def test_weights_of_a_file(tmp_path):
    small = open_clip.create_model('ViT-S-32')
    torch.save(dict(epoch=3, state_dict={'module.' + k: v for k, v in small.state_dict().items()}),
               tmp_path/'epoch_3.pt')
    read = pretrained_clip('ViT-S-32', str(tmp_path/'epoch_3.pt')).model.visual.conv1.weight
    assert torch.equal(read.cpu(), small.visual.conv1.weight)
    torch.save({k: v*float('nan') if k == 'text_projection' else v for k, v in small.state_dict().items()},
               tmp_path/'nan.pt')
    with pytest.raises(InvertuneError, match='text_projection holds NaN'):
        pretrained_clip('ViT-S-32', str(tmp_path/'nan.pt'))


def test_a_file_that_runs_code(tmp_path):
    (tmp_path/'model.pt').write_bytes(pickle.dumps(Code(tmp_path/'ran')))
    with pytest.raises(InvertuneError, match="can't load"): pretrained_clip('ViT-S-32', str(tmp_path/'model.pt'))
    assert not (tmp_path/'ran').exists()


# names that are too long

@pytest.mark.parametrize('classes', [['ship', 'ship'], ['ship', 'Ship'], ['ship', 'boat', ' ship '],
                                     ['a very very long name that ends in red',
                                      'a very very long name that ends in blue']])
def test_classes_that_read_the_same_are_refused(clip, classes):
    with pytest.raises(InvertuneError, match='are the same 8 tokens'):
        zero_shot_head(clip, classes, ['a photo of a {}', 'a {}'])


def test_a_cut_prompt_is_warned_of(clip):
    with pytest.warns(UserWarning,
                      match="the prompt 'a ship .* has 10 tokens, of which the model reads 8: its end is lost"):
        zero_shot_head(clip, ['ship that sails very far away today', 'boat'], ['a {}'])


@pytest.mark.filterwarnings('error')
def test_a_prompt_that_just_fits_is_not(clip):
    assert zero_shot_head(clip, ['one two three four five', 'boat'], ['a {}']).shape == (2, 32)  # 6 words and 2 marks
    with pytest.raises(UserWarning, match='has 9 tokens, of which the model reads 8'):
        zero_shot_head(clip, ['one two three four five six', 'boat'], ['a {}'])


@pytest.mark.filterwarnings('error')
def test_one_short_template_is_enough_to_tell_classes_apart(clip):
    with pytest.raises(UserWarning, match='its end is lost'):
        zero_shot_head(clip, ['red ship', 'blue ship'], ['a photo of a small old wooden {}', 'a {}'])


@pytest.mark.parametrize('tower', ['resnet', 'vit'])
def test_looking_leaves_no_trace(tower):
    "Hooks go when the look is over, also after an error; a look in eval mode moves no statistics."
    clip, x = tiny_clip(tower, **TINY).eval(), torch.rand(2, 3, 32, 32)
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        with Activations(clip) as acts:
            clip.encode_image(x.to(clip.device))
            1/0
    assert acts.out.keys() == named_layers(clip).keys()
    assert not any(l._forward_hooks for l in named_layers(clip).values())
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())


def test_pixels():
    x = torch.tensor([0, 255], dtype=torch.uint8)
    assert pixels(x).tolist() == [0, 1] and x.tolist() == [0, 255]


# towers of timm

@pytest.mark.parametrize('timm_name, pool, proj, layers', [
    ('test_vit', 'map', 'none', [f'block{i+1}' for i in range(6)]),                # as SigLIP
    ('test_convnext', '', 'linear', [f'stage{i+1}' for i in range(4)])])           # as open_clip's ConvNeXt
def test_layers_of_a_tower_of_timm(timm_name, pool, proj, layers):
    vision = open_clip.model.CLIPVisionCfg(timm_model_name=timm_name, timm_pool=pool, timm_proj=proj, image_size=32)
    text = open_clip.model.CLIPTextCfg(context_length=8, width=32, heads=1, layers=1)
    clip = Clip(open_clip.model.CLIP(64, vision, text), 8).eval()
    with torch.no_grad(), Activations(clip) as acts: clip.encode_image(torch.rand(2, 3, 32, 32))
    assert list(named_layers(clip)) == list(acts.out) == layers
    assert all(len(a) == 2 and a.dim() == (3 if pool == 'map' else 4) for _, a in acts.items())
    clip.model.visual.trunk = torch.nn.Identity()
    with pytest.raises(InvertuneError, match="don't know the layers of an image tower of type Identity"):
        named_layers(clip)


def test_a_model_from_elsewhere_has_a_reader_of_its_own(clip, tmp_path):
    write_tensors(tmp_path/'model.safetensors', weights(clip), config=dict(clip.config, origin={}))
    with pytest.raises(InvertuneError, match='open_checkpoint reads it'): load_clip(tmp_path/'model.safetensors')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu(tmp_path):
    "The whole path once on a GPU: train, save, read, embed."
    clip = tiny_clip(**TINY)
    assert clip.device.type == 'cuda'
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    train_clip(clip, images, ['an anchor', 'a heart']*16, epochs=1, lr=1e-3, bs=16)
    save_clip(clip, tmp_path/'model.safetensors')
    with torch.no_grad():
        assert torch.allclose(load_clip(tmp_path/'model.safetensors').encode_image(pixels(images, clip.device)),
                              clip.encode_image(pixels(images, clip.device)), atol=1e-5)
