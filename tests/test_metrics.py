"The evaluation's numbers, worked out by hand and against a second way to count."
import math

import pytest
import torch

from invertune.metrics import accuracy, _any_success, _attack_success, evaluate, retrieval, _robust_accuracy
from invertune.runtime import InvertuneError


def drawn(seed, n=300, classes=7):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (n,), generator=gen), torch.randint(classes, (n,), generator=gen)


@pytest.mark.parametrize('seed', range(5))
def test_any_success_is_the_highest_asr_of_any_target(seed):
    "Each class asked in turn with the function that counts for the true one."
    preds, labels = drawn(seed)
    each = [_attack_success(preds, labels, c)[0] for c in range(7)]
    share, at = _any_success(preds, labels, 7)
    assert share == pytest.approx(max(each)) and each[at] == pytest.approx(max(each))


def test_a_moved_backdoor_is_seen_where_the_asr_is_zero():
    "Every triggered image ends at class 3: the target's ASR is 0, robust accuracy is that class's share alone."
    labels = torch.arange(40) % 4
    preds = torch.full((40,), 3)
    assert _attack_success(preds, labels, 0)[0] == 0 and _any_success(preds, labels, 4) == (1., 3)
    assert _robust_accuracy(preds, labels, 0) == pytest.approx(1/3)


def test_a_perfect_reader_has_neither():
    labels = torch.arange(40) % 4
    assert _any_success(labels, labels, 4)[0] == 0 and _robust_accuracy(labels, labels, 0) == 1 and _attack_success(labels,
        labels, 0) == (0, .25)


def test_a_class_without_images_can_be_the_one_that_all_end_at():
    labels = torch.zeros(10, dtype=torch.long)
    assert _any_success(torch.full((10,), 2), labels, 3) == (1., 2)


def test_only_images_of_other_classes_count():
    "Two of the target's own, read wrongly: they are in no headline."
    labels, preds = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 1, 0])
    assert _attack_success(preds, labels, 0) == (.5, .25) and _robust_accuracy(preds, labels, 0) == .5
    with pytest.raises(InvertuneError, match='ASR is undefined'): _attack_success(preds[:2], labels[:2], 0)


def test_evaluate_says_all_of_it(small):
    "The demonstration's poisoned model, and its clean one under the same trigger."
    of = lambda clip, **kw: evaluate(clip, small.evaluation, small.classes, small.templates, small.trigger,
                                     small.target, **kw)
    bad, clean = of(small.bad), of(small.clip, n_retrieval=0)
    assert bad['asr'] > .9 and bad['robust'] < .1 and bad['any_class'] == small.classes[small.target] and bad['asr_any'] == pytest.approx(bad['asr'])
    assert clean['robust'] > .5 > clean['asr'] and clean['n_non_target'] == sum(small.evaluation.labels != small.target)
    assert 'i2t_r1' in bad and 'i2t_r1' not in clean
    alone = evaluate(small.bad, small.evaluation, small.classes, small.templates, n_retrieval=0)
    assert [alone[key] for key in ('asr', 'asr_with_target', 'robust', 'asr_any', 'any_class',
                                   'n_non_target')] == [None]*6 and alone['ca'] == bad['ca']


def test_retrieval_counts_any_owner_of_a_caption():
    e = torch.eye(3)
    assert retrieval(e[[0, 0, 2]], e[[0, 1, 2]], ['a', 'a', 'b'], ks=(1,)) == {'i2t_r1': 1., 't2i_r1': 1.}
    assert retrieval(e[[2, 2, 0]], e[[0, 1, 2]], ['a', 'a', 'b'], ks=(1,)) == {'i2t_r1': 0., 't2i_r1': 0.}
    assert retrieval(e, e, list('abc'), ks=(1, 2)) == {'i2t_r1': 1, 'i2t_r2': 1, 't2i_r1': 1, 't2i_r2': 1}
    assert accuracy(e, torch.tensor([1, 1, 1]), k=9) == 1 and math.isclose(accuracy(e, torch.tensor([0, 0, 0])), 1/3,
        abs_tol=1e-6)
