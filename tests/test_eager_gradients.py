"""Gradients that are computed with the value: the same as those of a backward pass."""

import gc

import pytest
import torch
from conftest import SITES
from torch import Tensor

from hf_saereg.eager_gradients import with_gradients
from hf_saereg.heads import FAMILIES, SAEHeadConfig, make_head


def scalar_with_gradients(scalar, x, parameters):
    value, others = with_gradients(lambda x: (scalar(x), "others"), x, parameters)
    assert others == "others"
    return value


def value(head, x):
    losses = head.losses(x)
    error = losses.reconstruction + losses.auxiliary
    return error / losses.norm + losses.sparsity


def head_and_x(architecture="standard"):
    torch.manual_seed(0)
    k = 4 if architecture in ("topk", "batchtopk") else None
    config = SAEHeadConfig(architecture, SITES[0], 16, 48, sparsity_coefficient=0.1, k=k)
    head = make_head(config).double()
    return head, torch.randn(60, 16, dtype=torch.float64, requires_grad=True)


def gradients(result: Tensor, head, x):
    # a power of two: bfloat16 rounds what is multiplied by it before as what is multiplied after
    return torch.autograd.grad(4 * result, [x, *head.parameters()], allow_unused=True)


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_same_value_and_gradients(architecture, kernel):
    head, x = head_and_x(architecture)
    head.kernel = kernel
    own = scalar_with_gradients(lambda x: value(head, x), x, list(head.parameters()))
    usual = value(head, x)
    assert own.item() == usual.item()
    for found, expected in zip(gradients(own, head, x), gradients(usual, head, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


def test_what_is_frozen_or_unread_gets_no_gradient():
    head, x = head_and_x()
    head.b_dec.requires_grad_(False)
    unread = torch.ones(3, requires_grad=True)
    parameters = [*head.parameters(), unread]
    scalar_with_gradients(lambda x: value(head, x), x.detach(), parameters).backward()
    assert x.grad is None
    assert head.b_dec.grad is None
    assert unread.grad is None
    assert head.W_enc.grad.abs().sum() > 0


def test_nothing_to_differentiate():
    head, x = head_and_x()
    with torch.no_grad():
        assert not scalar_with_gradients(lambda x: value(head, x), x, []).requires_grad
    assert not scalar_with_gradients(lambda x: value(head, x), x.detach(), []).requires_grad


def test_what_the_computation_kept_is_gone():
    kept = []

    class Marker:
        pass

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.marker = Marker()
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            kept.append(ctx.marker)
            return grad.expand(5)

    x = torch.ones(5, requires_grad=True)
    result = scalar_with_gradients(Keeps.apply, x, [])
    assert len(kept) == 1  # its backward has run already
    kept.clear()
    gc.collect()
    assert not any(isinstance(thing, Marker) for thing in gc.get_objects())
    result.backward()
    assert x.grad.tolist() == [1.0] * 5


def test_bfloat16_autocast_changes_the_forward_pass_only():
    head, x = head_and_x()
    head, x = head.float(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        own = scalar_with_gradients(lambda x: value(head, x), x, list(head.parameters()))
        usual = value(head, x)
    for found, expected in zip(gradients(own, head, x), gradients(usual, head, x), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
