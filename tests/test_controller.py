"""The controller of L0 on simulated heads, and a real head that settles."""

import math

import pytest
import torch

from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.controller import steer


def simulate(steps, target, first_l0=250.0, power=0.7, lag=50, noise=0.05, growth=0.0, seed=0):
    """L0 that follows c^-power with a lag of many steps, as a head's does; one value a step.

    It grows by `growth` a step where c stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    coefficient, smoothed, log_l0, seen = torch.tensor(0.01), torch.tensor(0.0), None, []
    at_first = math.log(first_l0) + power * math.log(0.01)
    for step in range(steps):
        settled = at_first + growth * step - power * math.log(coefficient)
        log_l0 = settled if log_l0 is None else log_l0 + (settled - log_l0) / lag
        draw = noise * torch.randn((), generator=generator).item()
        seen.append(math.exp(log_l0))
        steer(coefficient, smoothed, torch.tensor(math.exp(log_l0 + draw)), target)
    return seen


@pytest.mark.parametrize("target", [10, 30])
@pytest.mark.parametrize("power", [0.4, 0.7, 1.5])
@pytest.mark.parametrize("lag", [5, 50])
def test_l0_settles_within_a_tenth_and_stays_there(target, power, lag):
    seen = simulate(2000, target, power=power, lag=lag)
    assert all(abs(l0 / target - 1) < 0.1 for l0 in seen[1200:])
    assert min(seen) > target / 2  # no deep dive on the way


@pytest.mark.parametrize("target", [10, 30])
def test_l0_stays_at_its_target_while_the_coefficient_that_it_takes_grows(target):
    seen = simulate(2000, target, growth=0.7 * 0.005)  # half a percent of c a step
    assert all(abs(l0 / target - 1) < 0.1 for l0 in seen[1200:])


def test_thresholds_above_all_activations_come_down_to_them():
    torch.manual_seed(0)
    head = make_head(SAEHeadConfig("jumprelu", "blocks.0.hook_resid_pre", 16, 256, target_l0=6))
    x = 1e-3 * torch.randn(256, 16)  # a young model's; the first thresholds are 0.1
    seen = []
    for _ in range(600):
        statistics = head.losses(x).statistics
        head.observe(statistics.fired, statistics.tokens)
        seen.append(statistics.l0)
    assert seen[0] == 0
    assert all(l0 == pytest.approx(6, rel=0.1) for l0 in seen[-100:])


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_long_time_off_the_target_does_not_wind_the_coefficient_up(wrong):
    coefficient, smoothed = torch.tensor(0.3), torch.tensor(0.0)
    for _ in range(20_000):
        steer(coefficient, smoothed, torch.tensor(10 * wrong), 10)
    assert coefficient in (pytest.approx(1e-6), pytest.approx(1e6))
    for _ in range(1500):
        steer(coefficient, smoothed, torch.tensor(10 / wrong), 10)
    assert coefficient in (pytest.approx(1e-6), pytest.approx(1e6))  # the other one


def test_a_batch_without_tokens_or_features_leaves_a_usable_coefficient():
    coefficient, smoothed = torch.tensor(0.3), torch.tensor(0.0)
    for _ in range(1000):
        steer(coefficient, smoothed, torch.tensor(0.0), 10)
    assert 0 < coefficient < 0.3


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_a_real_head_settles_at_its_target_from_far_away(architecture):
    torch.manual_seed(0)
    config = SAEHeadConfig(architecture, "blocks.0.hook_resid_pre", 16, 256, target_l0=6)
    head = make_head(config)
    atoms = torch.randn(64, 16)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    seen = []
    for _ in range(1500):
        active = (torch.rand(256, 64) < 0.05).float()
        losses = head.losses((active * torch.rand(256, 64)) @ atoms)
        optimizer.zero_grad()
        (losses.reconstruction + losses.sparsity + losses.auxiliary).backward()
        optimizer.step()
        head.observe(losses.statistics.fired, losses.statistics.tokens)
        seen.append(losses.statistics.l0)
    assert seen[0] > 60
    last = torch.tensor(seen[-400:]).unflatten(0, (8, 50)).mean(dim=1)
    assert ((last / 6 - 1).abs() < 0.1).all(), last
