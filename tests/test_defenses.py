"A defense gets a model and clean pairs, and nothing else; what came in is as it was; the same seed gives the same model."
import ast
import inspect
import json
from dataclasses import fields

import pytest
import torch
import yaml

from invertune import defenses, identify, invert, tune
from invertune.defenses import DEFENSES, defend
from invertune.defender import Clean
from invertune.identify import start
from invertune.invert import load_bank, make_bank
from invertune.metrics import embed
from invertune.model import load_clip, pixels, save_clip, tiny_clip
from invertune.lab.profiles import ROOT
from invertune.runtime import InvertuneError

SHORT = {'none': {}, 'ft': dict(epochs=1, bs=16), 'cleanclip': dict(epochs=1, bs=16),
         'invertune-paper': dict(identify=dict(steps=2), invert=dict(steps=4), tune=dict(steps=3)),
         'invertune': dict(identify=dict(steps=2, families=('patch', 'warp'), named=1), invert=dict(steps=2, stride=56, families=('warp',)),
                           tune=dict(steps=3, gate=0., search=dict(steps=2, stride=56, families=('warp',))))}


def state(clip): return {k: v.clone() for k, v in clip.state_dict().items()}
def same(one, other): return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture(scope='module')
def received(small, tmp_path_factory):
    "The suspicious model as the pipeline hands it over: read from a file."
    file = tmp_path_factory.mktemp('poison')/'model.safetensors'
    save_clip(small.bad, file)
    return load_clip(file)


@pytest.fixture(scope='module')
def clean(small):
    d = small.defender
    return Clean(d.images[:64].clone(), list(d.captions[:64]), small.classes, small.templates)


@pytest.fixture(scope='module')
def defended(received, clean):
    "Every defense, once"
    before = state(received), clean.images.clone(), list(clean.captions)
    return before, {name: defend(name, received, clean, **SHORT[name]) for name in DEFENSES}


@pytest.mark.parametrize('name', DEFENSES)
def test_what_came_in_is_as_it_was(defended, received, clean, name):
    (weights, images, captions), made = defended
    assert same(state(received), weights) and torch.equal(clean.images, images) and clean.captions == captions
    assert not received.training and all(p.requires_grad and not p._backward_hooks for p in received.parameters())
    tuned, report = made[name]
    assert tuned is not received and not tuned.training and same(state(tuned), weights) == (name == 'none')
    assert all(p.requires_grad and not p._backward_hooks for p in tuned.parameters())  # whoever gets it can go on training
    assert report['seconds'] >= 0 and report['peak_mb'] > 0
    assert all(v.isfinite().all() for v in tuned.state_dict().values())


@pytest.mark.parametrize('name', DEFENSES)
def test_same_seed(defended, received, clean, name):
    "The same seed gives the same model, bit for bit, and the same report but for its cost."
    (_, made), (again, report) = defended, defend(name, received, clean, **SHORT[name])
    tuned, first = made[name]
    told = lambda r: json.dumps({k: v for k, v in r.items() if k not in ('seconds', 'peak_mb')}, sort_keys=True)
    assert same(state(tuned), state(again)) and told(first) == told(report)


def test_the_published_tuning_leaves_text_and_statistics_alone(defended):
    "The text tower and BatchNorm's running statistics are those of the received model."
    (before, _, _), made = defended
    after = made['invertune-paper'][0].state_dict()
    kept = [k for k in before if not k.startswith('model.visual.') or 'running' in k or 'num_batches' in k]
    assert len(kept) > 20 and all(torch.equal(before[k], after[k]) for k in kept)


def test_ours_takes_the_statistics_of_clean_images(defended, clean):
    "Those of the weights that it delivers; the text tower is the received one."
    (before, _, _), made = defended
    tuned = made['invertune'][0]
    after = state(tuned)
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith('model.visual.'))
    tune.settle(tuned, clean.images)
    assert all(torch.allclose(v, tuned.state_dict()[k], atol=1e-6) for k, v in after.items() if 'running' in k)
    assert any(not torch.allclose(before[k], after[k]) for k in before if 'running' in k)


def test_a_tower_without_batchnorm(clean):
    "Nothing to absorb, nothing to follow; it is tuned all the same."
    vit = tiny_clip('vit', width=4, layers=(1, 1), image_size=32, text_width=32, text_layers=1, embed_dim=32, context=8)
    bank = make_bank([(start('patch', 32), 1.)])
    tuned, _ = tune.erase(vit, clean.images, clean.head(vit), 4, bank, rounds=1, steps=2)
    assert not tune.batch_norms(vit) and same(state(tune.absorb(vit, clean.images)), state(vit)) and not same(state(tuned), state(vit))


def test_absorbing_changes_statistics_and_no_function(received, clean):
    "Statistics become those of the clean images; every image, of any kind, is embedded as before, and the received model stays as it is."
    before, noise = state(received), torch.randint(256, (16, *clean.images.shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = tune.absorb(received, clean.images)
    for images in (clean.images, noise): assert torch.allclose(embed(made, images), embed(received, images), atol=1e-5)
    assert same(state(received), before)
    first, seen = tune.batch_norms(made)[0], []
    handle = first.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(): made.encode_image(pixels(clean.images, 'cpu'))
    handle.remove()
    x = seen[0].transpose(0, 1).flatten(1)
    assert torch.allclose(first.running_mean, x.mean(1), atol=1e-5) and torch.allclose(first.running_var, x.var(1, correction=0), rtol=1e-3)
    assert not any(torch.allclose(a.running_mean, b.running_mean) for a, b in zip(tune.batch_norms(made), tune.batch_norms(received)))


def test_only_critical_rows_of_the_selected_layers_move(received, clean):
    "As published: nothing moves but the selected layers, and in tensors of their width only the rows of critical channels."
    bank = make_bank([(start('patch', 32), 1.)])
    tuned, report = tune.tune_paper(received, clean.images, bank, steps=3, lr=1e-3)
    mask = tune.inspect_layers(received, clean.images, bank[0])['masks'][report['selected'][0]]
    rows = mask.flatten(1).any(1)
    assert 0 < rows.sum() < len(rows) and report['critical'][report['selected'][0]]['channels'] == rows.sum()
    moved = {k for k, v in tuned.state_dict().items() if not torch.equal(v, received.state_dict()[k])}
    assert moved and all(k.startswith(tuple(f'model.visual.{n}.' for n in report['selected'])) for k in moved)
    k = f"model.visual.{report['selected'][0]}.0.conv3.weight"
    change = (tuned.state_dict()[k] - received.state_dict()[k]*(1 - 1e-3*1e-4)**3).abs().flatten(1).amax(1)  # less AdamW's own decay
    assert k in moved and change[~rows].max() < 1e-6 < change[rows].max()


# What a defender may know

ALLOWED = {'images', 'captions', 'classes', 'templates'}
SECRETS = ('trigger.safetensors', 'load_trigger', 'evaluation', 'attack_success', 'poison_pairs', 'pretrain', "['poison']", 'params.yaml', 'stage_params')


def test_clean_has_no_room_for_a_secret(clean):
    assert {f.name for f in fields(Clean)} == ALLOWED and vars(clean).keys() == ALLOWED
    with pytest.raises(TypeError): Clean(clean.images, clean.captions, clean.classes, clean.templates, target='umbrella')


@pytest.mark.parametrize('name', DEFENSES)
def test_a_defense_is_given_model_and_clean_pairs(name):
    parameters = list(inspect.signature(DEFENSES[name]).parameters)
    assert parameters[:3] == ['clip', 'clean', 'seed']
    assert not any(word in p for p in parameters for word in ('trigger', 'target', 'label', 'attack', 'poison'))


@pytest.mark.parametrize('module', [identify, invert, tune, defenses])
def test_no_module_of_a_defense_opens_a_secret(module):
    "Neither the evaluation's metrics nor the attacks are imported, and no file of theirs is named."
    tree = ast.parse(inspect.getsource(module))
    sources = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == 'metrics' for a in n.names}
    assert not sources & {'attacks', 'data', 'stages'} and names <= {'embed'}
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert not [s for s in SECRETS if s in words]


def stages(): return yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']
def files(entries): return [next(iter(e)) if isinstance(e, dict) else e for e in entries]


@pytest.mark.parametrize('stage', ['identify', 'invert', 'tune', 'baseline'])
def test_the_pipeline_keeps_secrets(stage):
    "Of what the attacker made, a defense's stage depends on the model alone; of the data, on the defender's set; of the evaluation, on nothing."
    deps = [d for d in files(stages()[stage]['deps']) if d.startswith(('results/', 'data'))]
    for d in deps:
        kind, rest = d.removeprefix('results/${item.profile}/').split('/', 1)
        assert kind in {'data': ['data'], 'poison': ['poison']}.get(kind, ['identify', 'invert', 'tune', 'baseline']), d
        if kind == 'data': assert rest == 'defender.json', d
        if kind == 'poison': assert rest == '${item.attack}/model.safetensors', d
    assert any('/poison/' in d for d in deps)
    assert not {'invertune/attacks.py', 'invertune/data.py'} & set(stages()[stage]['deps'])
    assert not any(p.split('.')[0] in ('poison', 'evaluate', 'report') for p in stages()[stage]['params'])


def test_who_reads_trigger_files():
    readers = {name for name, s in stages().items() if any('trigger' in d and 'results/' in d for d in files(s['deps']))}
    makers = {name for name, s in stages().items() if any('trigger.safetensors' in o for o in files(s['outs']))}
    assert readers == {'evaluate', 'relearn', 'ablate', 'scarce', 'foreign'} and makers == {'poison'}


@pytest.mark.parametrize('stage', ['identify', 'invert', 'tune', 'baseline'])
def test_the_notebook_keeps_secrets(stage):
    "What dvc.yaml promises, the stage's notebook keeps: its code names no trigger file, no evaluation image, no poisoned pair."
    path, = (ROOT/'nbs'/'pipeline').glob(f'[0-9][0-9]_{stage}.ipynb')
    code = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code')
    found = [w for w in ('trigger.safetensors', 'load_trigger', "['evaluation']", "['poison']", "['pretrain']", "'evaluate'", 'attack_success', 'metrics.json') if w in code]
    assert not found and "'poison', attack)/'model.safetensors'" in code


def test_rounds(received, clean):
    "One round is one tuning; each further one looks again and goes on from the last."
    head, search = clean.head(received), dict(steps=1, stride=112, families=())
    bank = make_bank([(start('patch', 32), 1.)])
    def erase(**kw): return tune.erase(received, clean.images, head, 4, bank, steps=2, search=search, **kw)
    once, _ = tune.tune(tune.absorb(received, clean.images), clean.images, head, 4, bank, received=received, steps=2)
    one, report = erase(rounds=1)
    assert same(state(one), state(once)) and not report['again'] and len(report['curve']) == 2
    two, report = erase(rounds=2)
    assert not same(state(two), state(one)) and len(report['again']) == 1 and [c['step'] for c in report['curve']] == [1, 2, 3, 4]


def test_the_target_is_its_text_and_its_prototype(received, clean):
    "A triggered image must come near neither; whoever asks for the text alone gets another model."
    head, bank = clean.head(received), make_bank([(start('patch', 32), 1.)])
    near, read = tune.prototypes(received, clean.images, head), embed(received, clean.images) @ head.T
    assert torch.allclose(near[4], torch.nn.functional.normalize(embed(received, clean.images[read.argmax(1) == 4]).mean(0), dim=0))
    x, masks = pixels(clean.images[:16], 'cpu'), tune.inspect_layers(received, clean.images, bank[0])['masks']
    def term(*aims): return tune.tuning_terms(received, received, x, bank[0](x), masks, head, torch.stack(aims), 0.)['embedding'].item()
    assert term(head[4], near[4]) >= max(term(head[4]), term(near[4])) > 0
    one, two = (tune.tune(received, clean.images, head, 4, bank, steps=2, moves=0, prototype=p)[0] for p in (True, False))
    assert not same(state(one), state(two))


def test_a_fresh_trigger_is_of_the_same_kind(received, clean):
    gen = torch.Generator().manual_seed(0)
    for family in identify.FAMILIES:
        old = start(family, 32, seed=1)
        new = tune.renew(old, 2, 2, gen)
        assert new.kind == old.kind and new.meta['inverted'] == family and new.tensors.keys() == old.tensors.keys()
        assert any(not torch.equal(new.tensors[k], v) for k, v in old.tensors.items())
        again = tune.renew(old, 0, 9, gen, anew=0.)
        assert again.tensors.keys() == old.tensors.keys() and again.tensors is not old.tensors  # a sign step puts a tensor in the place of another
        for k, v in again.tensors.items(): assert torch.equal(v, old.tensors[k])
        kept = {k: v.clone() for k, v in old.tensors.items()}
        identify.move(received, pixels(clean.images[:4], 'cpu'), again, lambda f: f.sum(), .1)
        assert any(not torch.equal(again.tensors[k], v) for k, v in kept.items()) and all(torch.equal(old.tensors[k], v) for k, v in kept.items())  # the bank's own stands still
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 28:, 28:] = 1
    patch = invert.Trigger('mask', dict(mask=mask, pattern=torch.rand(1, 3, 32, 32)), inverted='patch')
    def aside(anew): return {tuple(tune.renew(patch, 2, 16, gen, anew).tensors['mask'][0, 0].nonzero().min(0).values.tolist()) for _ in range(60)}
    near, far = aside(0.), aside(1.)
    assert near == {(y, x) for y in (26, 27, 28) for x in (26, 27, 28)} and 12 <= min(min(far)) < 20 and max(max(far)) == 28
    for _ in range(9): assert tune.renew(patch, 4, 16, gen).tensors['mask'].sum() == 16


def test_places_near_the_best():
    assert invert.around([(0, 0)], 4, 24) == [(0, 0), (0, 4), (4, 0), (4, 4)]
    assert identify.grid(32, 8, 16) == [(i, j) for i in (0, 16, 24) for j in (0, 16, 24)]
    assert identify.place_masks([(24, 0)], 32, 8)[0, 0].nonzero().min(0).values.tolist() == [24, 0]


# Bad input

def test_unknown_names(received, clean):
    head = clean.head(received)
    with pytest.raises(InvertuneError, match="unknown defense 'prayer': choose one of none, ft"): defend('prayer', received, clean)
    with pytest.raises(InvertuneError, match='unicorn'): clean.index('unicorn')
    with pytest.raises(InvertuneError, match="unknown family of perturbations 'fog'"): identify.identify(received, clean.images, head, families=['fog'])
    with pytest.raises(InvertuneError, match="unknown layer rule 'top4'"): tune.select_layers({'layer1': 1.}, 'top4')


def test_what_sags_is_the_class_that_fits_worse(monkeypatch):
    "Images read as class 1 lie farther from its text; of one image too few nothing is said."
    cosines = torch.tensor([.9]*3 + [.5]*3 + [.8]*3 + [.1]*2)
    f = torch.zeros(11, 8).index_put((torch.arange(11), torch.tensor([0]*3 + [1]*3 + [2]*3 + [3]*2)), cosines)
    f[:, 4] = (1 - cosines**2).sqrt()
    monkeypatch.setattr(identify, 'embed', lambda clip, images: images)
    assert identify.sags(None, f, torch.eye(8)[:4]).tolist() == pytest.approx([-.1, .3, 0., 0.])


def test_a_sag_decides_between_ways_of_one_length(received, clean, monkeypatch):
    head = clean.head(received)
    monkeypatch.setattr(identify, 'shortcut', lambda *args, **kw: -1.)
    for favoured in (0, 1):
        monkeypatch.setattr(identify, 'sags', lambda clip, images, head: torch.eye(len(head))[favoured] * .07)
        found = identify.identify(received, clean.images, head, families=['patch'], steps=1, named=len(head))
        assert found['index'] == favoured
        assert [c['score'] for c in found['candidates']] == pytest.approx([c['sag'] - 1 for c in found['candidates']]) and max(c['sag'] for c in found['candidates']) == pytest.approx(1)


def test_a_sag_within_chance_does_not_decide(received, clean, monkeypatch):
    "A text that fits better than usual takes nothing from the target with the shortest way, nor does one that sags no more than that."
    head = clean.head(received)
    ways = {0: -.01, 1: -.2}
    monkeypatch.setattr(identify, 'shortcut', lambda clip, images, head, index, *args, **kw: ways.get(index, -1.))
    monkeypatch.setattr(identify, 'sags', lambda clip, images, head: .02 * (torch.eye(len(head))[1] - torch.eye(len(head))[0]))
    found = identify.identify(received, clean.images, head, families=['patch'], steps=1, named=len(head))
    assert found['index'] == 0 and all(c['sag'] == 0 for c in found['candidates'])


def test_a_defense_that_diverges(received, clean):
    "An error, not a model."
    head, bank = clean.head(received), make_bank([(start('patch', 32), 1.)])
    with pytest.raises(InvertuneError, match='ft, epoch .*: the loss became'): defend('ft', received, clean, epochs=4, lr=1e15, bs=16)
    with pytest.raises(InvertuneError, match=r'tune \(paper\): the loss became'): tune.tune_paper(received, clean.images, bank, steps=20, lr=1e25)
    with pytest.raises(InvertuneError, match='tune: the loss became'): tune.tune(received, clean.images, head, 4, bank, steps=20, lr=1e25)


def test_bank_files(tmp_path):
    bank, file = make_bank([(start('warp', 32), .25), (start('patch', 32, seed=1), 1.)]), tmp_path/'ours.safetensors'
    bank.save(file)
    x, again = torch.rand(2, 3, 32, 32), load_bank(file)
    assert again.asr == [1., .25] and again.kind == ['patch', 'warp'] and all(torch.equal(a(x), b(x)) for a, b in zip(again.triggers, bank.triggers))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InvertuneError, match='not a whole safetensors file'): load_bank(file)
    start('patch', 32).save(file)
    with pytest.raises(InvertuneError, match='is not a bank of inverted triggers'): load_bank(file)
