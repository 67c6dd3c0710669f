"""KL between two predictions: what it is, its gradient, and what it keeps in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_saereg import divergence
from hf_saereg.divergence import kl_of_predictions

BATCH, SEQUENCE, VOCABULARY = 6, 20, 50


@pytest.fixture
def predictions():
    """Logits of a reference and of a model, and labels with padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, SEQUENCE, VOCABULARY)
    reference, logits = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, VOCABULARY, shape[:2], generator=generator)
    labels[1, 12:] = labels[2, :5] = labels[4] = -100
    return reference, logits.requires_grad_(), labels


def by_definition(reference, logits, labels):
    """Sum of Σ p log(p / q), and the number of predicted tokens."""
    predicted = labels[:, 1:] != -100
    p, q = (x[:, :-1][predicted].log_softmax(-1) for x in (reference, logits))
    return (p.exp() * (p - q)).sum(), predicted.sum()


@pytest.mark.parametrize("rows", [1, 7, 19, 20, 1024])
@pytest.mark.parametrize("number", [None, 33])
def test_value_and_gradient_are_those_of_the_definition(predictions, monkeypatch, rows, number):
    monkeypatch.setattr(divergence, "ROWS_AT_ONCE", rows)
    reference, logits, labels = predictions
    total, predicted = by_definition(*predictions)
    expected = total / (number or predicted)
    found = kl_of_predictions(reference, logits, labels, number)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][labels.roll(-1, dims=1) == -100] == 0).all()


class LargestNew(TorchDispatchMode):
    """The most numbers in a tensor that did not lie in memory before."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.largest = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        return result


def test_a_few_rows_at_a_time_are_copied(predictions, monkeypatch):
    monkeypatch.setattr(divergence, "ROWS_AT_ONCE", 3)
    reference, logits, labels = predictions
    with LargestNew(reference, logits) as forward:
        loss = kl_of_predictions(reference, logits, labels)
    assert 0 < forward.largest <= 3 * VOCABULARY
    with LargestNew(reference, logits) as backward:
        loss.backward()
    assert 0 < backward.largest <= logits.numel()  # its gradient


def test_a_batch_that_predicts_nothing_has_none(predictions):
    reference, logits, labels = predictions
    loss = kl_of_predictions(reference, logits, torch.full_like(labels, -100), number=5)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
