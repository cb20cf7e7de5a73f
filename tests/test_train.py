"Processes that share a batch: the gradient of one, the same bits twice, and nothing left behind."
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from invertune import train
from invertune.model import pixels, save_clip, tiny_clip
from invertune.runtime import InvertuneError
from invertune.train import clip_loss, fit, gather, train_clip

TINY = dict(image_size=32, width=8, text_width=32, text_layers=1, embed_dim=32, context=8)
IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
COLORED = [f'a {color} {thing}' for color in ('red', 'green', 'blue') for thing in ('anchor', 'heart')]
CAPTIONS = COLORED*10 + ['a cat']*4


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch): monkeypatch.setenv('INVERTUNE_DEVICE', 'cpu')


def weights(clip): return torch.cat([v.detach().double().flatten() for v in clip.state_dict().values()])


def digest(clip):
    return hashlib.sha256(b''.join(v.contiguous().numpy().tobytes() for v in clip.state_dict().values())).hexdigest()


def environment(**more):
    "Of an interpreter that can import this file."
    path = os.path.dirname(__file__), os.environ.get('PYTHONPATH', '')
    return os.environ | {'PYTHONPATH': os.pathsep.join(path), 'OMP_NUM_THREADS': '1'} | more


def trained(workers, tower='resnet', **kw):
    clip = tiny_clip(tower, **TINY)
    history = train_clip(clip, IMAGES, CAPTIONS, **dict(epochs=2, lr=1e-3, bs=16, workers=workers, desc='t') | kw)
    return clip, history


def still(clip):
    "Let BatchNorm keep its statistics while `clip` is trained."
    clip.train = lambda mode=True: nn.Module.train(clip, False)
    return clip


@pytest.mark.parametrize('workers', [2, 3])
@pytest.mark.parametrize('tower', ['resnet', 'vit'])
def test_gradient_of_one(monkeypatch, tower, workers):
    "With plain descent at a rate of 1, what a step takes from the weights is the gradient."
    monkeypatch.setattr(train, 'make_optimizer', lambda named, lr, wd: torch.optim.SGD([p for _, p in named], lr))
    monkeypatch.setattr(train, 'cosine_lr', lambda *args: 1.)
    one, several = (still(tiny_clip(tower, **TINY)) for _ in range(2))
    before = weights(one)
    def step(clip, workers): return train_clip(clip, IMAGES, CAPTIONS, epochs=1, lr=1., bs=64, workers=workers)[0]
    losses = step(one, 1), step(several, workers)
    gradient, same = before - weights(one), before - weights(several)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and gradient.norm() > .1
    assert (gradient - same).norm() < 1e-4*gradient.norm()


def darker(x, gen): return x*(.5 + torch.rand(len(x), 1, 1, 1, generator=gen)/2)


@pytest.mark.parametrize('kw', [{}, dict(tower='vit', shift=2, augment=darker)])
def test_same_bits_twice(kw):
    (one, first), (other, second) = trained(2, **kw), trained(2, **kw)
    assert digest(one) == digest(other) and first == second


def test_the_command_gives_the_same_bits():
    "In another interpreter, too"
    code = 'from test_train import *; print(digest(trained(2)[0]))'
    env = environment(OMP_NUM_THREADS='2')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == digest(trained(2)[0]), out.stderr


def test_batchnorm_sees_both_halves():
    "The mean of the halves' means is the mean of the whole; a rate of zero keeps the weights."
    one, two = (trained(w, lr=0., epochs=1)[0].model.visual.bn1.running_mean for w in (1, 2))
    assert torch.allclose(one, two, atol=1e-6) and one.abs().max() > 1e-3


def test_each_worker_augments_on_its_own(tmp_path):
    def note(x, gen):
        torch.save(torch.rand(4, generator=gen), tmp_path/f'{train._team.rank}.pt')
        return x
    trained(2, epochs=1, augment=note)
    zero, one = (torch.load(tmp_path/f'{rank}.pt', weights_only=True) for rank in (0, 1))
    assert not torch.equal(zero, one)


def test_the_model_is_ordinary_afterwards(tmp_path):
    "It can be saved, and has threads, team and epochs as before."
    threads, seen = torch.get_num_threads(), []
    clip, history = trained(2, on_epoch=lambda epoch: seen.append((epoch, os.getpid())))
    save_clip(clip, tmp_path/'model.safetensors')
    assert seen == [(0, os.getpid()), (1, os.getpid())] and len(history) == 2 and not clip.training
    assert torch.get_num_threads() == threads and train._team.size == 1 and not multiprocessing.active_children()


@pytest.mark.parametrize('workers, sentence', [
    (0, 'workers=0: write 1'), (9, 'at most half of the 16 pairs'),
    ('2', "'workers' is '2'"), (1.5, "'workers' is 1.5")])
def test_wrong_numbers_of_workers(workers, sentence):
    with pytest.raises(InvertuneError, match=sentence): trained(workers)


def broken(rank, error):
    "A loss that goes wrong in one process, in the second step."
    clip, calls = tiny_clip(**TINY), []
    def batch_loss(idx):
        calls.append(1)
        if train._team.rank == rank and len(calls) == 2: error()
        img, txt = gather(*clip(pixels(IMAGES[idx]), clip.tokenize([CAPTIONS[i] for i in idx])))
        return clip_loss(img, txt, clip.scale)
    fit(clip, batch_loss, 64, 1, 1e-3, bs=16, workers=2)


def raises(error):
    def f(): raise error
    return f


@pytest.mark.parametrize('rank, error, kind, sentence', [
    (1, raises(ValueError('no such pair')), InvertuneError, '^worker 1: ValueError: no such pair$'),
    (1, raises(InvertuneError('The pairs are damaged.')), InvertuneError, '^The pairs are damaged.$'),
    (1, lambda: os.kill(os.getpid(), signal.SIGKILL), InvertuneError, 'ended from outside'),
    (1, lambda: sys.exit(3), InvertuneError, 'ended from outside'),
    (0, raises(ZeroDivisionError('here')), ZeroDivisionError, 'here'),
    (0, raises(KeyboardInterrupt('now')), KeyboardInterrupt, 'now')])
def test_failure(rank, error, kind, sentence):
    with pytest.raises(kind, match=sentence): broken(rank, error)
    assert not multiprocessing.active_children() and train._team.size == 1


def test_a_loss_that_is_no_number():
    with pytest.raises(InvertuneError, match='epoch 1: the loss became nan'): trained(2, lr=1e15)
    assert not multiprocessing.active_children()


TRAINS = '''
from test_train import *
def tell(epoch): print('trains', *(w.pid for w in multiprocessing.active_children()), flush=True)
trained(2, epochs=10**4, on_epoch=tell)
'''

def runs(pid):
    "A process that has ended, but was not waited for, does not run."
    try: return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError: return False


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='looks processes up in /proc')
@pytest.mark.parametrize('how, group', [
    (signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGKILL, False)])
def test_no_process_is_left(how, group):
    "Whether a notebook interrupts its kernel, a terminal its group, or the parent is killed."
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore it
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen)
    with subprocess.Popen([sys.executable, '-c', TRAINS], env=environment(TQDM_DISABLE='1'), **pipes) as parent:
        worker = int(parent.stdout.readline().split()[1])
        assert runs(worker)
        (os.killpg if group else os.kill)(parent.pid, how)
        parent.communicate(timeout=60)
    end = time.time() + 60
    while runs(worker) and time.time() < end: time.sleep(.1)
    assert not runs(worker) and parent.returncode != 0
