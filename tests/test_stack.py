"""Stacked heads compute what each of them computes alone, and train to the same weights."""

import copy

import pytest
import torch

from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.stack import LARGEST, HeadStack
from hf_saereg.sweep import Track

HEADS, TOKENS, D_IN, D_SAE = 3, 40, 8, 24
FAMILIES = {
    "topk": {"k": 3},
    "topk, auxk": {"k": 3, "auxk": 4, "dead_after_tokens": 2 * TOKENS},
    "standard": {"sparsity_coefficient": 0.3},
    "standard, tied": {"sparsity_coefficient": 0.3, "tied": True},
    "standard, steered": {"sparsity_coefficient": 0.3, "target_l0": 4.0},
    "jumprelu": {"sparsity_coefficient": 0.1, "bandwidth": 0.5},
    "jumprelu, steered": {"sparsity_coefficient": 0.1, "bandwidth": 0.5, "target_l0": 4.0},
    "jumprelu, quadratic": {
        **{"sparsity_coefficient": 0.1, "bandwidth": 0.5},
        **{"target_l0": 4.0, "quadratic_penalty": True},
    },
    "jumprelu, reference": {
        **{"sparsity_coefficient": 0.1, "bandwidth": 0.05, "reference_window": True}
    },
}


def bank_of(name, kernel="auto", **others):
    torch.manual_seed(0)
    family, options = name.partition(",")[0], FAMILIES[name] | others
    heads = [
        make_head(SAEHeadConfig(family, f"blocks.{i}.hook_resid_pre", D_IN, D_SAE, **options))
        for i in range(HEADS)
    ]
    for i, head in enumerate(heads):
        head.double()
        head.kernel = kernel
        for parameter in head.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        if "steered_coefficient" in head._buffers:
            head.steered_coefficient.mul_(1 + i)
        # as many dead as AuxK takes, more, and none: another number of each head
        head.tokens_since_fired[: (2, 9, 0)[i]] = 10**9
    return HeadBank(heads)


def activations_of(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, TOKENS, D_IN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_those_of_the_heads(name, kernel):
    x = activations_of()
    alone, stacked = bank_of(name, kernel), bank_of(name, kernel)
    every = [head.losses(own) for head, own in zip(alone, x, strict=True)]
    expected = sum(own.reconstruction + own.sparsity + own.auxiliary for own in every)
    expected.backward()
    assert all(own.auxiliary > 0 for own in every[:2]) == ("auxk" in name)
    stack = HeadStack.of(stacked)
    found = stack.losses(x)
    found.total.backward()
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
    assert found.tokens == TOKENS
    for fired, losses in zip(found.fired, every, strict=True):
        torch.testing.assert_close(fired, losses.statistics.fired)
    for parameter, _ in stack.wide.named_parameters():
        gradient = stack.wide.get_parameter(parameter).grad
        own = [head.get_parameter(parameter).grad for head in alone]
        axis = 1 if parameter == "W_enc" else 0
        whole = torch.stack(own) if parameter == "b_dec" else torch.cat(own, axis)
        torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_leaves_every_head_what_it_becomes_alone(name, monkeypatch):
    tracks = []
    for is_stacked in (True, False):
        with monkeypatch.context() as patch:
            if not is_stacked:
                patch.setattr(HeadStack, "can_hold", lambda heads, tokens: False)
            track = Track.of(bank_of(name), 12, TOKENS)
            assert (track.stack is not None) == is_stacked
            branches = [track]
            for step in range(12):
                if step == 5:
                    branches.append(track.branch(12))
                x = dict(zip(track.bank.hook_names, activations_of(step), strict=True))
                for branch in branches:
                    branch.train(x, 1e-2)
            tracks.append(branches)
    for whole, other in zip(*tracks, strict=True):
        expected = other.bank.state_dict()
        for key, tensor in whole.bank.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-8, atol=1e-10, msg=key)
    for key, tensor in tracks[0][0].bank.state_dict().items():  # the branch went its way alone
        torch.testing.assert_close(tensor, tracks[0][1].bank.state_dict()[key], msg=key)


def test_heads_are_views_of_the_wide_head():
    bank = bank_of("topk")
    before = copy.deepcopy(bank.state_dict())
    stack = HeadStack.of(bank)
    for key, tensor in bank.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)
    with torch.no_grad():
        stack.wide.W_enc.zero_()
    assert all(not head.W_enc.any() for head in bank)
    bank.load_state_dict(before)
    assert stack.wide.W_enc.any()


def test_what_cannot_be_stacked_is_not():
    assert HeadStack.can_hold(bank_of("topk"), TOKENS)
    assert not HeadStack.can_hold(bank_of("topk"), LARGEST // D_SAE)
    assert not HeadStack.can_hold(list(bank_of("topk"))[:1], TOKENS)
    assert not HeadStack.can_hold(bank_of("topk", normalization="layer_norm"), TOKENS)
    wide, *others = bank_of("topk")
    wide.config.k = 2
    assert not HeadStack.can_hold([wide, *others], TOKENS)
