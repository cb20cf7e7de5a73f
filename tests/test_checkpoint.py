"Checkpoints of others: every weight used and none left over, or one sentence; a file never runs anything."
import argparse
import copy
import errno
import functools
import json
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import invertune.compat  # before open_clip
import open_clip
from invertune import checkpoint
from invertune.checkpoint import open_checkpoint, save_open_clip
from invertune.model import MEAN, STD, save_clip, tiny_clip
from invertune.runtime import InvertuneError

TINY = dict(image_size=32, width=8, text_width=32, text_layers=1, embed_dim=32, context=8)
TEXT = dict(context_length=8, vocab_size=99, width=32, heads=2, layers=1)
VISION = dict(rn=dict(image_size=32, layers=[1, 1, 1, 1], width=8, head_width=16, patch_size=None),
              vit=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8))
MINI = {k: dict(embed_dim=24, vision_cfg=v, text_cfg=TEXT) for k, v in VISION.items()}
TIMM = {'siglip': dict(embed_dim=64, custom_text=True, init_logit_bias=-10,
                       vision_cfg=dict(image_size=32, timm_model_name='test_vit', timm_pool='map', timm_proj='none'),
                       text_cfg=TEXT | dict(width=64, no_causal_mask=True, proj_bias=True, pool_type='last')),
        'convnext': dict(embed_dim=24, vision_cfg=dict(image_size=32, timm_model_name='test_convnext', timm_pool='',
                                                       timm_proj='linear'), text_cfg=TEXT)}


TOKENIZER = functools.lru_cache(open_clip.SimpleTokenizer)


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    "open_clip with small architectures of its own kind, each with GELU and with QuickGELU."
    for kind, model in MINI.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f'mini-{kind}', model)
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f'mini-{kind}-quickgelu', model | dict(quick_gelu=True))
    monkeypatch.setattr(open_clip, 'SimpleTokenizer', TOKENIZER)  # to read its vocabulary once is enough


def made(model, seed=0):
    "A module of open_clip with random weights; statistics of batches as well."
    torch.manual_seed(seed)
    module = checkpoint._make(model).eval()
    with torch.no_grad():
        for k, v in module.state_dict().items():
            if k.endswith('logit_scale'): v.fill_(2.5)
            elif k.endswith('running_var'): v.copy_(torch.rand_like(v))
            elif v.is_floating_point(): v.add_(.1*torch.randn_like(v))
    return module


@pytest.fixture(params=['rn', 'vit'])
def source(request): return made(MINI[request.param] | dict(quick_gelu=True))


@pytest.fixture
def rn(): return made(MINI['rn'] | dict(quick_gelu=True))


def weights(module): return {k: v.detach().cpu().clone().contiguous() for k, v in module.state_dict().items()}


def same(clip, module, atol=0):
    "Do both towers give the embeddings of the module?"
    gen = torch.Generator().manual_seed(1)
    side, device = clip.image_size, clip.device
    x = torch.rand(3, 3, side, side, generator=gen).to(device)
    text = torch.randint(1, 99, (3, clip.config['context']), generator=gen).to(device)
    module = copy.deepcopy(module).to(device).eval()
    with torch.no_grad():
        pairs = [(clip.encode_image(x), module.encode_image((x - clip.mean)/clip.std, normalize=True)),
                 (clip.encode_text(text), module.encode_text(text, normalize=True))]
    return all(torch.allclose(a, b, atol=atol or 1e-6, rtol=0) for a, b in pairs)


def used(clip, tensors):
    "Is each weight of the file the weight of that name in the model, and none left over?"
    have = {k.removeprefix('text.'): v for k, v in clip.model.state_dict().items()}
    return have.keys() == {k.removeprefix('text.') for k in tensors} and all(
        torch.equal(have[k.removeprefix('text.')].cpu().reshape(v.shape), v.float() if v.is_floating_point() else v)
        for k, v in tensors.items())


# the families

def numbers(): return dict(neurons=np.arange(4), share=np.float64(.5), many=np.ones((2, 2), dtype=np.float32))

FAMILIES = {
    'Detect-CLIP: bare': lambda w: w,
    'ordered': lambda w: OrderedDict(w),
    'parameters': lambda w: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()},
    'DDP': lambda w: {f'module.{k}': v for k, v in w.items()},
    'CleanCLIP, BadCLIP': lambda w: dict(epoch=3, name='run', state_dict={f'module.{k}': v for k, v in w.items()},
                                         optimizer=dict(state={0: dict(exp_avg=torch.ones(3))}, param_groups=[{}, {}])),
    'no epoch': lambda w: dict(state_dict=w),
    'PAR': lambda w: dict(epoch=1, state_dict={f'module.{k}': v for k, v in w.items()}, optimizer={}, scaler={},
                          best_acc1=.5, args=argparse.Namespace(lr=1e-5, model='RN50', deep=argparse.Namespace(a=[1]))),
    'Detect-CLIP: another path': lambda w: dict(model=w, optimizer={}, epoch=1, scaler=None, args=argparse.Namespace()),
    'thop': lambda w: w | dict(total_ops=torch.zeros(1), total_params=torch.zeros(1)) | {
        'visual.conv1.total_ops': torch.zeros(1), 'module.transformer.total_params': torch.zeros(1)},
    'InverTune': lambda w: dict(epoch=1, state_dict=w, optimizer_state_dict={}, scheduler_state_dict={}, loss=.1,
                                critical_layers=['layer4'], critical_neurons=numbers()),
    'ImmuneCLIP': lambda w: dict(epoch=1, state_dict=w, critical_neurons={'a': [1]}, source_checkpoint='a.pt'),
    'ImmuneCLIP: another path': lambda w: dict(state_dict=w, step=9, args=dict(lr=1), metadata=numbers()),
    'model_state_dict': lambda w: dict(model_state_dict=w, epoch=1),
    'wrapped twice': lambda w: dict(model=dict(state_dict={f'model.module.{k}': v for k, v in w.items()})),
    'a resize in front': lambda w: {f'1.{k}': v for k, v in w.items()},
    'compiled': lambda w: {f'_orig_mod.{k}': v for k, v in w.items()},
    'a prefix on some': lambda w: {f'module.{k}' if i % 2 else k: v for i, (k, v) in enumerate(w.items())},
    'logit_scale as a list': lambda w: w | dict(logit_scale=w['logit_scale'].view(1)),
    'text tower under text.': lambda w: {
        k if k.startswith(('visual.', 'logit_')) else f'text.{k}': v for k, v in w.items()},
}

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('family', FAMILIES)
def test_family(source, tmp_path, family):
    "As pickle, as an old pickle and, where its content allows, as safetensors"
    content = FAMILIES[family](weights(source))
    torch.save(content, tmp_path/'new.pt')
    torch.save(content, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    if all(isinstance(v, torch.Tensor) for v in content.values()):
        save_file({k: v.detach() for k, v in content.items()}, tmp_path/'safe.safetensors')
    for file in tmp_path.iterdir():
        clip = open_checkpoint(file, quick_gelu=True)
        assert used(clip, weights(source)) and same(clip, source), file.name
        assert clip.config['quick_gelu'] and clip.config['origin']['quick_gelu'] == 'the caller'
        assert not clip.training and clip.config['name'].startswith('mini-')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(source, tmp_path, dtype):
    "As OpenAI's: some weights of half precision, others not"
    w = {k: v.to(dtype) if v.is_floating_point() and 'ln_' not in k and 'bn' not in k else v
         for k, v in weights(source).items()}
    torch.save(w, tmp_path/'m.pt')
    clip = open_checkpoint(tmp_path/'m.pt', quick_gelu=True)
    module = copy.deepcopy(source)
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in w.items()})
    assert used(clip, w) and same(clip, module)
    assert {v.dtype for v in clip.model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['script', 'trace'])
def test_an_archive_of_openai(tmp_path, how):
    "TorchScript, half precision in parts, three sizes stored as tensors: read without its program, with QuickGELU."
    for kind in MINI:
        module = made(MINI[kind] | dict(quick_gelu=True))
        for size, value in (('input_resolution', 32), ('context_length', 8), ('vocab_size', 99)):
            if hasattr(module, size): delattr(module, size)
            module.register_buffer(size, torch.tensor(value))
        module.half().float()
        module.visual.conv1.half()
        x, text = torch.rand(1, 3, 32, 32), torch.ones(1, 8, dtype=torch.int64)
        if how == 'script': archive = torch.jit.script(module)
        else:
            module.visual.conv1.float()
            archive = torch.jit.trace_module(module, dict(encode_image=x, encode_text=text), check_trace=False)
        torch.jit.save(archive, tmp_path/'RN50.pt')
        clip = open_checkpoint(tmp_path/'RN50.pt')
        w = {k: v for k, v in weights(module).items() if k not in checkpoint._NO_WEIGHTS}
        assert used(clip, w) and same(clip, module.float())
        assert clip.config['quick_gelu'] and 'OpenAI' in clip.config['origin']['quick_gelu']
        assert clip.config['mean'] == list(MEAN) and clip.config['std'] == list(STD)


def in_transformers_names(w):
    "What transformers calls the weights of a ViT: written apart from the reader's table."
    out = {}
    for k, v in w.items():
        side = 'vision_model' if k.startswith('visual.') else 'text_model'
        k = k.removeprefix('visual.')
        if k == 'logit_scale': out[k] = v
        elif k == 'proj': out['visual_projection.weight'] = v.T.contiguous()
        elif k == 'text_projection': out['text_projection.weight'] = v.T.contiguous()
        elif k.startswith('transformer.resblocks.'):
            _, _, n, *rest = k.split('.')
            at, rest = f'{side}.encoder.layers.{n}', '.'.join(rest)
            if rest.startswith('attn.in_proj_'):
                for part, third in zip('qkv', v.chunk(3)):
                    out[f'{at}.self_attn.{part}_proj.{rest.removeprefix("attn.in_proj_")}'] = third.contiguous()
            else:
                first, last = rest.rsplit('.', 1)
                names = {'attn.out_proj': 'self_attn.out_proj', 'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2',
                         'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}
                out[f'{at}.{names[first]}.{last}'] = v
        else:
            names = {'class_embedding': 'embeddings.class_embedding',
                     'conv1.weight': 'embeddings.patch_embedding.weight',
                     'positional_embedding': 'embeddings.position_embedding.weight',
                     'token_embedding.weight': 'embeddings.token_embedding.weight'}
            stem, _, last = k.partition('.')
            norms = {'ln_pre': 'pre_layrnorm', 'ln_post': 'post_layernorm', 'ln_final': 'final_layer_norm'}
            out[f'{side}.{names.get(k) or f"{norms[stem]}.{last}"}'] = v
    return out


@pytest.mark.parametrize('act, quick', [('quick_gelu', True), ('gelu', False)])
def test_a_folder_of_transformers(tmp_path, act, quick):
    module = made(MINI['vit'] | dict(quick_gelu=quick))
    w = in_transformers_names(weights(module))
    positions = {f'{side}.embeddings.position_ids': torch.arange(8)[None] for side in ('text_model', 'vision_model')}
    save_file(w | positions, tmp_path/'model.safetensors', {'format': 'pt'})
    (tmp_path/'config.json').write_text(json.dumps(dict(
        model_type='clip', text_config=dict(hidden_act=act), vision_config=dict(hidden_act=act))))
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[.5, .4, .3], image_std=[.2, .2, .3])))
    clip = open_checkpoint(tmp_path)
    assert used(clip, weights(module)) and same(clip, module)
    assert clip.config['quick_gelu'] == quick and clip.config['origin']['quick_gelu'] == 'config.json'
    assert clip.config['mean'] == [.5, .4, .3] and clip.config['origin']['mean'] == 'preprocessor_config.json'
    missing = 'vision_model.encoder.layers.1.self_attn.k_proj.bias'
    save_file({k: v for k, v in w.items() if k != missing}, tmp_path/'model.safetensors')
    with pytest.raises(InvertuneError, match='in_proj_bias has shape'): open_checkpoint(tmp_path)


@pytest.mark.parametrize('weights_file', ['open_clip_model.safetensors', 'open_clip_pytorch_model.bin', 'other.pt'])
@pytest.mark.parametrize('kind', [*MINI, *TIMM])
def test_a_folder_of_open_clip(tmp_path, kind, weights_file):
    "As `push_to_hf_hub` writes it: towers of timm, and architectures that open_clip does not list, as well"
    model = (MINI | TIMM)[kind] | dict(quick_gelu=kind == 'rn')
    module = made(model)
    if weights_file.endswith('.safetensors'): save_file(weights(module), tmp_path/weights_file)
    else: torch.save(weights(module), tmp_path/weights_file)
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(
        model_cfg=model, preprocess_cfg=dict(mean=[.5]*3, std=[.5]*3, interpolation='bilinear', resize_mode='squash'))))
    clip = open_checkpoint(tmp_path)
    assert used(clip, weights(module)) and same(clip, module)
    assert clip.config['quick_gelu'] == (kind == 'rn') and clip.config['mean'] == [.5]*3
    assert clip.config['interpolation'] == 'bilinear' and clip.config['resize_mode'] == 'squash'
    assert clip.config['name'] == (f'mini-{kind}' if kind in MINI else '')
    theirs = open_clip.create_model(f'local-dir:{tmp_path}').eval() if weights_file[-3:] != '.pt' else module
    assert same(clip, theirs)


@pytest.mark.parametrize('tower', ['resnet', 'vit'])
def test_our_own(tmp_path, tower):
    "With a header, and as the bare weights of one"
    clip = tiny_clip(tower, **TINY).eval()
    save_clip(clip, tmp_path/'m.safetensors', attack='badnet')
    torch.save(weights(clip.model), tmp_path/'m.pt')
    for file in tmp_path.iterdir():
        again = open_checkpoint(file)
        assert used(again, weights(clip.model)) and same(again, clip.model)
        for k, v in clip.config.items():  # the depth of a ViT is read off as one number
            assert again.config[k] == v or k == 'layers' and sum(again.config[k]) == sum(v)


@pytest.mark.parametrize('kind', [*MINI, *TIMM])
def test_what_was_opened_can_be_saved(tmp_path, kind):
    "`save_clip`, `save_open_clip` as a folder and, for what open_clip has a name for, as a file"
    model = (MINI | TIMM)[kind] | dict(quick_gelu=kind in MINI)
    module = made(model)
    save_file(weights(module), tmp_path/'open_clip_model.safetensors')
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=model, preprocess_cfg=dict(mean=[.4]*3))))
    clip = open_checkpoint(tmp_path)
    save_clip(clip, tmp_path/'a'/'own.safetensors')
    lines = [save_open_clip(clip, tmp_path/'b', attack='none')]
    if kind in MINI: lines.append(save_open_clip(clip, tmp_path/'c'/'m.safetensors'))
    else:
        with pytest.raises(InvertuneError, match='give a folder'): save_open_clip(clip, tmp_path/'c.safetensors')
    for file in ['a/own.safetensors', 'b', *(['c/m.safetensors'] if kind in MINI else [])]:
        again = open_checkpoint(tmp_path/file)
        assert used(again, weights(module)) and same(again, module) and again.config['mean'] == [.4]*3
        assert again.config | dict(origin=0) == clip.config | dict(origin=0)
    for line in lines:
        theirs = eval(line, dict(open_clip=open_clip))
        assert same(clip, theirs) and tuple(theirs.visual.image_mean) == (.4, .4, .4)


def test_a_cleaned_model_goes_back_into_open_clip(rn, tmp_path):
    "By the name and the path alone, as its users do"
    torch.save(weights(rn), tmp_path/'m.pt')
    clip = open_checkpoint(tmp_path/'m.pt', quick_gelu=True)
    with torch.no_grad(): clip.model.visual.conv1.weight.mul_(.5)
    line = save_open_clip(clip, tmp_path/'cleaned.safetensors', attack='none')
    assert line == f"open_clip.create_model('mini-rn-quickgelu', pretrained='{tmp_path/'cleaned.safetensors'}')"
    assert same(clip, open_clip.create_model('mini-rn-quickgelu', pretrained=str(tmp_path/'cleaned.safetensors')))
    assert same(open_checkpoint(tmp_path/'cleaned.safetensors'), clip.model)
    with pytest.raises(InvertuneError, match='give a folder'):
        save_open_clip(tiny_clip(**TINY), tmp_path/'t.safetensors')
    line = save_open_clip(tiny_clip('vit', **TINY).eval(), tmp_path/'tiny')
    assert same(open_checkpoint(tmp_path/'tiny'), eval(line, dict(open_clip=open_clip)))


# one tower alone

TOWERS = {'BadEncoder': lambda w: dict(epoch=1, state_dict=w, optimizer={}),
          'DECREE': lambda w: dict(state_dict={f'module.{k}': v for k, v in w.items()}),
          'PAR': lambda w: dict(vision_encoder_state_dict=w, epoch=1), 'bare': lambda w: w,
          'visual.': lambda w: {f'visual.{k}': v for k, v in w.items()}}

@pytest.mark.parametrize('family', TOWERS)
def test_an_image_tower_alone(source, tmp_path, family):
    torch.save(weights(source), tmp_path/'base.pt')
    base = open_checkpoint(tmp_path/'base.pt', quick_gelu=True)
    other = made(MINI['rn' if hasattr(source.visual, 'layer1') else 'vit'] | dict(quick_gelu=True), seed=1)
    torch.save(TOWERS[family](weights(other.visual)), tmp_path/'m.pth')
    with pytest.raises(InvertuneError, match='image tower alone: give the model whose text tower'):
        open_checkpoint(tmp_path/'m.pth')
    clip = open_checkpoint(tmp_path/'m.pth', base=base)
    source.visual.load_state_dict(other.visual.state_dict())
    assert same(clip, source) and clip.config['quick_gelu']
    assert used(clip, weights(source)) and 'text tower' in clip.config['origin']['quick_gelu']


def test_a_text_tower_alone(tmp_path):
    "As AMDET shares it, in the names of transformers"
    module, other = made(MINI['vit'] | dict(quick_gelu=True)), made(MINI['vit'] | dict(quick_gelu=True), seed=1)
    torch.save(weights(module), tmp_path/'base.pt')
    base = open_checkpoint(tmp_path/'base.pt', quick_gelu=True)
    w = {k: v for k, v in in_transformers_names(weights(other)).items() if k.startswith('text_')}
    save_file(w, tmp_path/'model.safetensors')
    with pytest.raises(InvertuneError, match='a text tower alone: give the model whose image tower'):
        open_checkpoint(tmp_path/'model.safetensors')
    clip = open_checkpoint(tmp_path/'model.safetensors', base=base)
    expected = weights(other) | {k: v for k, v in weights(module).items() if k.startswith(('visual.', 'logit_'))}
    assert used(clip, expected)
    save_file({k: v for k, v in w.items() if k != 'text_projection.weight'}, tmp_path/'model.safetensors')
    lacks = open_checkpoint(tmp_path/'base.pt', quick_gelu=True, name='mini-vit')
    with pytest.raises(InvertuneError, match='embed_dim 0 instead of 24'):
        open_checkpoint(tmp_path/'model.safetensors', base=lacks)
    with pytest.raises(InvertuneError, match='leave base out'): open_checkpoint(tmp_path/'base.pt', base=base)


# which architecture

NAMED = ['RN50', 'RN101', 'RN50x4', 'RN50x16', 'RN50x64', 'ViT-B-32', 'ViT-B-16', 'ViT-L-14', 'ViT-L-14-336',
         'ViT-H-14', 'ViT-B-32-256', 'ViT-S-32', 'ViT-B-16-SigLIP', 'ViT-B-16-SigLIP2', 'ViT-L-16-SigLIP-256',
         'convnext_base', 'convnext_large', 'coca_ViT-B-32', 'EVA02-B-16', 'MobileCLIP-S1']

@pytest.mark.parametrize('name', NAMED)
def test_the_weights_know_their_architecture(name, tmp_path):
    "Names and shapes alone: no memory is needed"
    want = checkpoint._shapes(open_clip.get_model_config(name))
    found = checkpoint._by_weights(dict(want), False, tmp_path/'m.pt')
    assert found['name'] == name and checkpoint._shapes(found['model']).keys() == want.keys()


@pytest.mark.parametrize('name', ['convnext_base_w', 'convnext_large_d', 'ViT-B-16-SigLIP-256'])
def test_what_fits_several_is_not_guessed(name, tmp_path):
    want = dict(checkpoint._shapes(open_clip.get_model_config(name)))
    fits = checkpoint._candidates(checkpoint._facts(want), want)
    if len(fits) == 1: return
    with pytest.raises(InvertuneError, match=f'fits .*{name}.* alike: say which with name='):
        checkpoint._by_weights(want, False, tmp_path/'m.pt')


@pytest.mark.parametrize('name', ['RN50', 'RN50x4', 'ViT-B-32', 'ViT-L-14'])
def test_an_unknown_activation_is_not_guessed(name, tmp_path):
    want = dict(checkpoint._shapes(open_clip.get_model_config(name)))
    with pytest.raises(InvertuneError, match='whether it computes with QuickGELU: give quick_gelu=True .* if'):
        checkpoint._by_weights(want, None, tmp_path/'m.pt')


def activation(clip): return type(clip.model.transformer.resblocks[0].mlp.gelu).__name__

def test_the_caller_decides_on_the_activation(rn, tmp_path):
    torch.save(weights(rn), tmp_path/'m.pt')
    for how, expected in ((dict(quick_gelu=True), 'QuickGELU'), (dict(quick_gelu=False), 'GELU'),
                          (dict(name='mini-rn'), 'GELU'), (dict(name='mini-rn-quickgelu'), 'QuickGELU'),
                          (dict(name='mini-rn', quick_gelu=True), 'QuickGELU')):
        clip = open_checkpoint(tmp_path/'m.pt', **how)
        assert activation(clip) == expected and clip.config['quick_gelu'] == (expected == 'QuickGELU')
        save_clip(clip, tmp_path/'again.safetensors')
        assert activation(open_checkpoint(tmp_path/'again.safetensors')) == expected
    clip = open_checkpoint(tmp_path/'m.pt', quick_gelu=True, mean=(.1, .2, .3), std=(.3, .2, .1))
    assert clip.config['mean'] == [.1, .2, .3] and clip.std.flatten().tolist() == pytest.approx([.3, .2, .1])
    assert clip.config['origin']['mean'] == 'the caller' and clip.model.visual.preprocess_cfg['mean'] == [.1, .2, .3]
    for bad in (dict(mean=(.1, .2)), dict(std=(0, 0, 0)), dict(mean=.5), dict(mean=(float('nan'),)*3)):
        with pytest.raises(InvertuneError, match='mean|statistics'):
            open_checkpoint(tmp_path/'m.pt', quick_gelu=True, **bad)


def test_a_bias_of_siglips_loss(tmp_path):
    module = made(MINI['rn'] | dict(init_logit_bias=-10))
    torch.save(weights(module), tmp_path/'m.pt')
    clip = open_checkpoint(tmp_path/'m.pt', quick_gelu=False)
    assert used(clip, weights(module)) and same(clip, module)
    save_clip(clip, tmp_path/'again.safetensors')
    assert same(open_checkpoint(tmp_path/'again.safetensors'), module)


def test_building_to_compare_is_fast():
    begin = time.process_time()
    for name in ('ViT-bigG-14', 'RN50x64'): checkpoint._shapes(open_clip.get_model_config(name))
    assert time.process_time() - begin < 10


# what is refused

def drop(w): del w['visual.conv1.weight']
def extra(w): w['visual.conv9.weight'] = torch.zeros(3)
def probe(w): w['linear.weight'], w['linear.bias'] = torch.zeros(3, 24), torch.zeros(3)
def rename(w): w['image_encoder.conv1.weight'] = w.pop('visual.conv1.weight')
def off_by_one(w): w['text_projection'] = torch.zeros(32, 25)
def off_by_one_row(w): w['positional_embedding'] = torch.zeros(9, 32)
def off_by_one_word(w): w['token_embedding.weight'] = torch.zeros(100, 32)
def off_inside(w): w['ln_final.weight'] = torch.zeros(33)
def nan(w): w['text_projection'][0, 0] = float('nan')
def inf(w): w['visual.conv1.weight'].view(-1)[3] = float('-inf')
def cut(w): w['text_projection'] = w['text_projection'].int()
def below(w): w['visual.bn1.running_var'] -= 2
def twice(w): w['module.logit_scale'] = torch.zeros(())
def no_tensor(w): w['epoch'] = 3
def inside(w): w['visual.module.conv1.weight'] = w.pop('visual.conv1.weight')
def sparse(w): w['text_projection'] = w['text_projection'].to_sparse()
def expanded(w): w['text_projection'] = torch.zeros(1, 1).expand(32, 24)
def meta(w): w['text_projection'] = torch.zeros(32, 24, device='meta')
def no_block(w): [w.pop(k) for k in list(w) if k.startswith('transformer.resblocks.0')]
def scalars(w): w.update({k: torch.zeros(()) for k in w})
def empty(w): w.clear()

@pytest.mark.parametrize('damage, sentence', [
    (drop, r"missing \['visual.conv1.weight'\]"), (extra, r"1 unknown \['visual.conv9.weight'\]"),
    (probe, r"2 unknown \['linear.bias', 'linear.weight'\]"), (rename, '1 keys missing .* 1 unknown'),
    (off_by_one, 'text_projection has shape .32, 25., the model wants .32, 24.'),
    (off_by_one_row, 'positional_embedding has shape .9, 32., the model wants .8, 32.'),
    (off_by_one_word, 'token_embedding.weight has shape .100, 32., the model wants .99, 32.'),
    (off_inside, 'ln_final.weight has shape .33., the model wants .32.'),
    (nan, 'text_projection holds NaN or infinity'),
    (inf, 'visual.conv1.weight holds NaN or infinity'), (cut, "'text_projection' is of type torch.int32"),
    (below, "'visual.bn1.running_var' is a variance below zero"), (twice, "two weights called 'logit_scale'"),
    (no_tensor, "'epoch' is no tensor but a int"), (inside, 'unknown .*visual.module.conv1.weight'),
    (sparse, "'text_projection' is no plain tensor"), (expanded, "'text_projection' is no plain tensor"),
    (meta, "'text_projection' is no plain tensor"), (no_block, 'keys missing'), (scalars, 'm.pt'),
    (empty, 'holds no CLIP: its weights are none')])
def test_weights_that_do_not_fit(rn, tmp_path, damage, sentence):
    w = weights(rn)
    damage(w)
    torch.save(w, tmp_path/'m.pt')
    for name in ('', 'mini-rn'):
        try: open_checkpoint(tmp_path/'m.pt', name=name, quick_gelu=True)
        except InvertuneError as e: said = str(e)
        else: raise AssertionError('opened')
        assert '\n' not in said
        if not name:
            assert re.search(sentence, said), said


FOREIGN = {
    'a warp grid': (lambda: torch.zeros(1, 8, 8, 2), 'holds one Tensor'),
    'a list': (lambda: [torch.zeros(1)], 'holds one list'),
    'a number': (lambda: 3, 'holds one int'), 'a trigger': (lambda: dict(mask=torch.zeros(3), trigger=torch.zeros(3)),
                                                          'holds no CLIP: its weights are mask, trigger'),
    'BackdoorBench': (lambda: dict(model_name='preactresnet18', num_classes=10, img_size=[32, 32, 3],
                                   model={'conv1.weight': torch.zeros(3), 'linear.weight': torch.zeros(3)},
                                   bd_train=dict(poison_indicator=np.zeros(3))), 'holds no CLIP'),
    'a ResNet': (lambda: {'conv1.weight': torch.zeros(64, 3, 7, 7), 'fc.weight': torch.zeros(9, 9)}, 'holds no CLIP'),
    'an empty dict': (dict, 'holds no CLIP'), 'two models': (lambda: dict(model={}, state_dict={}), 'several models'),
    'wrapped without end': (lambda: deep(9), 'wrapped too deep'), 'a circle': (lambda: circle(), 'wrapped too deep'),
    'epochs alone': (lambda: dict(epoch=3), "'epoch' is no tensor"),
    'names that are numbers': (lambda: {1: torch.zeros(1)}, 'holds no CLIP'),
    'a SigLIP of transformers': (lambda: {'vision_model.embeddings.patch_embedding.bias': torch.zeros(1)},
                                 'SigLIP of transformers'),
}

def deep(n): return dict(model=deep(n-1)) if n else {}

def circle():
    d = {}
    d['state_dict'] = d
    return d

@pytest.mark.parametrize('what', FOREIGN)
def test_foreign_content(tmp_path, what):
    content, sentence = FOREIGN[what]
    torch.save(content(), tmp_path/'m.pt')
    with pytest.raises(InvertuneError, match=sentence) as said: open_checkpoint(tmp_path/'m.pt')
    assert '\n' not in str(said.value)


FILES = {'nothing': b'', 'text': b'not a model', 'html': b'<!DOCTYPE html><html>', 'a pointer': b'version https',
         'PNG': b'\x89PNG\r\n\x1a\n' + bytes(99), 'zeros': bytes(999), 'the head of a zip': b'PK\x03\x04',
         'the head of a pickle': b'\x80\x02', 'a pickle without an end': b'\x80\x02}q\x00',
         'gzip': b'\x1f\x8b\x08' + bytes(99),
         'a pickle of protocol 0': pickle.dumps({'a': 1}, 0), 'a pickle of protocol 4': pickle.dumps({'a': 1}, 4),
         'safetensors of nothing': b'\xff'*8 + b'{', 'a long name': b'\x80\x02X\xff\xff\xff\x7f'}

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('ending', ['.pt', '.safetensors', '.bin', ''])
@pytest.mark.parametrize('what', FILES)
def test_foreign_files(tmp_path, what, ending):
    (tmp_path/f'm{ending}').write_bytes(FILES[what])
    with pytest.raises(InvertuneError) as said: open_checkpoint(tmp_path/f'm{ending}')
    assert str(tmp_path) in str(said.value) and '\n' not in str(said.value)


@pytest.mark.parametrize('kept', [1, 10, 100, .3, .9, -1])
@pytest.mark.parametrize('kind', ['new.pt', 'old.pt', 'm.safetensors'])
def test_truncated(rn, tmp_path, kind, kept):
    file = tmp_path/kind
    if kind == 'm.safetensors': save_file(weights(rn), file)
    else: torch.save(weights(rn), file, _use_new_zipfile_serialization=kind == 'new.pt')
    content = file.read_bytes()
    file.write_bytes(content[:int(kept*len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(InvertuneError) as said: open_checkpoint(file, quick_gelu=True)
    assert '\n' not in str(said.value)


@pytest.mark.parametrize('seed', range(20))
def test_a_flipped_byte_never_crashes(rn, tmp_path, seed):
    "A damaged file opens as weights or is refused: nothing else comes out."
    torch.save(dict(state_dict=weights(rn), args=argparse.Namespace(a=1)), tmp_path/'m.pt')
    content = bytearray((tmp_path/'m.pt').read_bytes())
    draw = random.Random(seed)
    size = 9 if seed % 2 else len(content)//50
    for _ in range(draw.choice([1, 8, 64])): content[draw.randrange(size)] ^= 1 << draw.randrange(8)
    (tmp_path/'m.pt').write_bytes(content)
    try: open_checkpoint(tmp_path/'m.pt', quick_gelu=True)
    except InvertuneError as e: assert '\n' not in str(e)


def test_a_zip_that_swells(tmp_path, rn):
    with zipfile.ZipFile(tmp_path/'m.pt', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('m/data.pkl', pickle.dumps({}, 2))
        z.writestr('m/data/0', bytes(10**7))
    with pytest.raises(InvertuneError, match='grow when unpacked'): open_checkpoint(tmp_path/'m.pt')
    with zipfile.ZipFile(tmp_path/'n.pt', 'w') as z: z.writestr('note.txt', 'a note')
    with pytest.raises(InvertuneError, match='no checkpoint of torch'): open_checkpoint(tmp_path/'n.pt')
    np.savez(tmp_path/'b.npz', a=np.zeros(3))
    with pytest.raises(InvertuneError, match='big_vision'): open_checkpoint(tmp_path/'b.npz')


# nothing is run

class Run:
    "A pickle that calls something when it is read."
    def __init__(self, call, *args): self.call, self.args = call, args
    def __reduce__(self): return self.call, self.args

class Built(argparse.Namespace):
    "Something that is built from a state: a class that the reader does not know."

def payloads(mark):
    write = f"open({str(mark)!r}, 'w').write('ran')"
    return {'os.system': Run(os.system, f'touch {mark}'), 'eval': Run(eval, write), 'exec': Run(exec, write),
            'open': Run(open, str(mark), 'w'), 'getattr': Run(getattr, 'a', 'lower'), 'import': Run(__import__, 'this'),
            'subprocess': Run(subprocess.call, ['touch', str(mark)]), 'compile': Run(compile, write, 'a', 'exec'),
            'pickle in a pickle': Run(pickle.loads, pickle.dumps(Run(os.system, f'touch {mark}'))),
            'torch.load': Run(torch.load, str(mark)), 'a module of torch': torch.nn.Linear(2, 2), 'a function': print,
            'a class of ours': Built(a=1), 'partial': Run(functools.partial, os.system, f'touch {mark}'),
            'np.load': Run(np.load, str(mark), None, True), 'shutil': Run(shutil.rmtree, str(mark.parent))}

NESTED = {'alone': lambda p, w: p, 'in the metadata': lambda p, w: dict(state_dict=w, metadata=dict(deep=[(1, p)])),
          'in a Namespace': lambda p, w: dict(state_dict=w, args=argparse.Namespace(lr=p)),
          'as a weight': lambda p, w: w | dict(logit_scale=p)}

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('where', NESTED)
@pytest.mark.parametrize('what', payloads(Path('mark')))
def test_a_pickle_runs_nothing(rn, tmp_path, what, where):
    mark = tmp_path/'ran'
    for new in (True, False):
        content = NESTED[where](payloads(mark)[what], weights(rn))
        torch.save(content, tmp_path/'m.pt', _use_new_zipfile_serialization=new)
        with pytest.raises(InvertuneError, match='may run code, so it is not opened') as said:
            open_checkpoint(tmp_path/'m.pt', quick_gelu=True)
        assert '\n' not in str(said.value) and not mark.exists()


def test_a_whole_module_is_refused(rn, tmp_path):
    torch.save(rn, tmp_path/'m.pt')
    with pytest.raises(InvertuneError, match=r"wants 'open_clip\.\w+\.\w+', which may run code.*state_dict"):
        open_checkpoint(tmp_path/'m.pt')


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('what', ['os.system', 'eval', 'torch.load'])
def test_a_script_archive_runs_nothing(tmp_path, what):
    "The pickle of a TorchScript archive is data from outside, too; its code is never looked at."
    mark = tmp_path/'ran'
    with zipfile.ZipFile(tmp_path/'m.pt', 'w') as z:
        z.writestr('m/data.pkl', pickle.dumps(payloads(mark)[what], 2))
        z.writestr('m/constants.pkl', pickle.dumps(payloads(mark)[what], 2))
        z.writestr('m/version', '3')
        z.writestr('m/code/__torch__.py', f"open({str(mark)!r}, 'w')")
    with pytest.raises(InvertuneError, match='may run code'): open_checkpoint(tmp_path/'m.pt')
    assert not mark.exists()


def test_the_environment_cannot_loosen_it(rn, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save(Run(os.system, f'touch {tmp_path/"ran"}'), tmp_path/'m.pt')
    with pytest.raises(InvertuneError, match='may run code'): open_checkpoint(tmp_path/'m.pt')
    assert not (tmp_path/'ran').exists()


def test_harmless_classes_are_let_through_for_one_file_alone(rn, tmp_path):
    torch.save(dict(state_dict=weights(rn), args=argparse.Namespace(a=1)), tmp_path/'m.pt')
    before = torch.serialization.get_safe_globals()
    open_checkpoint(tmp_path/'m.pt', quick_gelu=True)
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'m.pt', weights_only=True)


# descriptions from outside

@pytest.mark.parametrize('change, sentence', [
    (dict(vision_cfg=3), 'describes no model'), (dict(vision_cfg={}), 'is not what is said of it'),
    (dict(text_cfg={'depth': 3}), 'describes no model'), (dict(embed_dim='many'), 'embed_dim 24 instead of many'),
    (dict(vision_cfg=VISION['rn'] | dict(width=10**9)), 'is not what is said of it'),
    (dict(vision_cfg=VISION['rn'] | dict(layers=[10**9]*4)), 'is not what is said of it'),
    (dict(vision_cfg=VISION['rn'] | dict(image_size=64)), 'positional_embedding has shape'),
    (dict(vision_cfg=VISION['rn'] | dict(image_size=10**7)), 'describes no model|positional_embedding has shape'),
    (dict(vision_cfg=VISION['rn'] | dict(head_width=0)), 'describes no model'),
    (dict(vision_cfg=dict(timm_model_name='hf-hub:someone/something')), 'is not what is said of it'),
    (dict(text_cfg=TEXT | dict(layers=5)), 'text_layers 1 instead of 5'), (dict(speed=3), 'describes no model'),
    (dict(text_cfg=TEXT | dict(heads=0)), 'describes no model'),
    (dict(text_cfg=TEXT | dict(heads=5)), 'describes no model'),
    (dict(text_cfg=TEXT | dict(hf_model_name='someone/something')), 'text tower of transformers'),
    (dict(text_cfg=TEXT | dict(tokenizer_kwargs=dict(trust_remote_code=True))), "setting 'trust_remote_code'")])
def test_a_description_that_is_not_true(rn, tmp_path, change, sentence):
    torch.save(weights(rn), tmp_path/'model.pt')
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=MINI['rn'] | change)))
    with pytest.raises(InvertuneError, match=sentence) as said: open_checkpoint(tmp_path)
    assert '\n' not in str(said.value)


def test_an_address_in_a_description_is_not_followed(tmp_path):
    model = copy.deepcopy(TIMM['convnext'])
    torch.save(weights(made(model)), tmp_path/'model.pt')
    for name in ('hf-hub:someone/something', '../local-dir', 'local-dir:.'):
        model['vision_cfg']['timm_model_name'] = name
        (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=model)))
        with pytest.raises(InvertuneError, match='is no architecture of timm'): open_checkpoint(tmp_path)


@pytest.mark.parametrize('config', [{'kind': 'huge'}, {'kind': ['tiny']}, {'kind': 'tiny', 'depth': 3}, {},
                                    {'kind': 'tiny', 'width': '16'}, {'kind': 'tiny', 'width': -1},
                                    {'kind': 'tiny', 'width': 10**12}, {'kind': 'tiny', 'layers': [1]},
                                    {'kind': 'pretrained'}, {'kind': 'pretrained', 'name': 'RN0'},
                                    {'kind': 'pretrained', 'name': 'hf-hub:someone/something'},
                                    {'kind': 'open_clip', 'model': {}}, {'kind': 'open_clip', 'model': 3}])
def test_a_header_that_is_not_true(tmp_path, config):
    save_file(weights(tiny_clip(**TINY).model), tmp_path/'m.safetensors', {'meta': json.dumps(dict(config=config))})
    with pytest.raises(InvertuneError) as said: open_checkpoint(tmp_path/'m.safetensors')
    assert '\n' not in str(said.value)


def test_folders_that_are_none(rn, tmp_path):
    with pytest.raises(InvertuneError, match='holds no weights'): open_checkpoint(tmp_path)
    for n in ('a.pt', 'b.pt'): torch.save(weights(rn), tmp_path/n)
    with pytest.raises(InvertuneError, match=r'holds 2 files of weights \(a.pt, b.pt\), none of a usual name'):
        open_checkpoint(tmp_path)
    (tmp_path/'b.pt').unlink()
    assert same(open_checkpoint(tmp_path, quick_gelu=True), rn)
    for content, sentence in (('{', 'is no JSON'), ('[]', 'holds no settings'), ('{"model_cfg": 3}', 'QuickGELU')):
        (tmp_path/'open_clip_config.json').write_text(content)
        with pytest.raises(InvertuneError, match=sentence): open_checkpoint(tmp_path)


# names, tags and the hub: no test fetches anything

@pytest.mark.parametrize('source, sentence', [
    ('no/such/file.pt', 'no file and no folder here'), ('RN50', 'no file and no folder'), ('', 'no file and no folder'),
    ('RN50:', 'no file and no folder'), ('RN0:openai', 'no file and no folder'), ('ViT-S-32:openai', 'there are none'),
    ('RN50:openia', "did you mean 'openai'"), ('hf-hub:', 'write hf-hub:OWNER/NAME'),
    ('hf-hub:name', 'write hf-hub:OWNER/NAME')])
def test_names_that_are_none(source, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvertuneError, match=sentence): open_checkpoint(source)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    "A machine with an empty cache, on which every look-up of an address fails."
    def fail(*_, **__): raise OSError(errno.ENETUNREACH, 'Network is unreachable')
    for name in ('getaddrinfo', 'create_connection'): monkeypatch.setattr(socket, name, fail)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)


@pytest.mark.parametrize('source, repo', [
    ('RN50:openai', 'timm/resnet50_clip.openai'),
    ('ViT-B-32:laion2b_s34b_b79k', 'laion/CLIP-ViT-B-32-laion2B-s34B-b79K'),
    ('hf-hub:someone/something', 'someone/something')])
def test_without_a_network_the_sentence_comes_in_seconds(offline, source, repo):
    begin = time.perf_counter()
    with pytest.raises(InvertuneError, match=f"where there is a network run 'hf download {repo} --local-dir FOLDER'"):
        open_checkpoint(source)
    assert time.perf_counter() - begin < 8


def test_the_hub_from_its_cache(offline, rn, tmp_path):
    "What lies in the cache is opened without a network."
    repo = tmp_path/'hub'/'models--someone--something'
    folder = repo/'snapshots'/'abc'
    folder.mkdir(parents=True)
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text('abc')
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=MINI['rn'] | dict(quick_gelu=True))))
    with pytest.raises(InvertuneError, match='hf download'): open_checkpoint('hf-hub:someone/something')
    save_file(weights(rn), folder/'open_clip_model.safetensors')
    clip = open_checkpoint('hf-hub:someone/something')
    assert same(clip, rn) and clip.config['quick_gelu']


def test_a_tag(rn, tmp_path, monkeypatch):
    "What the tag says is used and shown; nothing beside it is taken."
    save_file(weights(rn), tmp_path/'w.safetensors')
    entry = dict(quick_gelu=True, mean=(.5, .5, .5), std=(.25, .5, .5), interpolation='bicubic', resize_mode='squash')
    for place in (open_clip, open_clip.factory): monkeypatch.setattr(place, 'get_pretrained_cfg', lambda *_: entry)
    monkeypatch.setattr(open_clip.factory, 'download_pretrained', lambda *_, **__: str(tmp_path/'w.safetensors'))
    clip = open_checkpoint('mini-rn:a_tag')
    assert same(clip, rn) and clip.config['mean'] == [.5, .5, .5] and clip.config['resize_mode'] == 'squash'
    assert 'a_tag' in clip.config['origin']['quick_gelu'] and clip.config['quick_gelu']
    save_clip(clip, tmp_path/'again.safetensors')
    assert same(open_checkpoint(tmp_path/'again.safetensors'), rn)
    with pytest.raises(InvertuneError, match='says all of itself'): open_checkpoint('mini-rn:a_tag', quick_gelu=False)


def test_a_tokenizer_that_is_not_here(tmp_path, monkeypatch):
    "The model opens, and the sentence comes when a text is read."
    def fail(*_, **__): raise ImportError('no transformers')
    monkeypatch.setattr(open_clip.tokenizer, 'HFTokenizer', fail)
    model = copy.deepcopy(TIMM['siglip'])
    model['text_cfg']['hf_tokenizer_name'] = 'timm/ViT-B-16-SigLIP'
    save_file(weights(module := made(model)), tmp_path/'open_clip_model.safetensors')
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=model)))
    clip = open_checkpoint(tmp_path)
    assert same(clip, module) and clip.config['tokenizer'] == 'timm/ViT-B-16-SigLIP'
    with pytest.raises(InvertuneError, match="tokenizer 'timm/ViT-B-16-SigLIP'.*no transformers"): clip.tokenize(['a'])


# prefixes

@pytest.mark.parametrize('seed', range(40))
def test_any_prefixes_come_off_and_nothing_else(seed):
    "Random names, in whose middle the prefixes stand as well, under random prefixes: the names come back."
    draw = random.Random(seed)
    parts = ['visual', 'module', 'model', '1', '10', 'modules', 'layer1', 'weight', '_orig_mod', 'text', 'ln', '']
    first = ['visual', 'layer', 'ln', '11', 'amodule', 'models', '']
    names = {'.'.join([draw.choice(first), *draw.choices(parts, k=3)]) for _ in range(20)}
    names = {n for n in names if n.rpartition('.')[2] not in checkpoint._NO_WEIGHTS}
    front = lambda: ''.join(draw.choices(['module.', 'model.', '1.', '_orig_mod.'], k=draw.randrange(4)))
    plain = {n: torch.tensor(float(i)) for i, n in enumerate(sorted(names))}
    found = checkpoint._strip({front() + n: v for n, v in plain.items()}, 'm.pt')
    assert found.keys() == plain.keys() and all(torch.equal(found[n], v) for n, v in plain.items())


@pytest.mark.parametrize('seed', range(20))
def test_any_wrapping_comes_off(seed):
    draw = random.Random(seed)
    inner = content = {'a.weight': torch.zeros(1)}
    for _ in range(draw.randrange(4)):
        content = {draw.choice(checkpoint._WRAPPERS): content, 'epoch': 1, 'optimizer': {'state': {}}, 'args': None}
    assert checkpoint._unwrap(content, 'm.pt') is inner


# the caller

def draws(): return torch.rand(1).item(), np.random.rand(), random.random()

@pytest.mark.parametrize('deterministic', [True, False])
def test_the_callers_random_numbers_and_flags_stay(rn, tmp_path, deterministic):
    torch.save(weights(rn), tmp_path/'m.pt')
    def seed(): torch.manual_seed(5); np.random.seed(5); random.seed(5)
    was = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.use_deterministic_algorithms(deterministic)
    try:
        seed(); expected = draws()
        seed(); clip = open_checkpoint(tmp_path/'m.pt', quick_gelu=True)
        save_open_clip(clip, tmp_path/'folder')
        open_checkpoint(tmp_path/'folder')
        assert draws() == expected and torch.are_deterministic_algorithms_enabled() == deterministic
        assert (torch.backends.cudnn.benchmark, torch.get_num_threads()) == was[1:]
        assert torch.get_default_dtype() == torch.float32 and torch.zeros(1).device.type == 'cpu'
    finally: torch.use_deterministic_algorithms(was[0])
