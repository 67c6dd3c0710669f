"""Before and between training steps: where `b_dec` starts, and a new life for dead latents.

Notable:
- both look at real activations, so a trainer calls them, not a head
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_saereg.heads.base import SAEHead

CENTRES = ("zero", "mean", "geometric_median")
WEISZFELD_STEPS = 100
RESAMPLED_ENCODER_NORM = 0.2  # of the living latents' mean


def centre(x: Tensor, how: str) -> Tensor:
    """A point in the middle of activations, (d_in,), for `b_dec` to start from.

    Args:
        x: (tokens, d_in), as the head reads them.
        how: one of `CENTRES`; the geometric median, the point with the smallest mean distance, by
            Weiszfeld's iteration.
    """
    if how == "zero":
        return torch.zeros_like(x[0])
    point = x.mean(dim=0)
    if how == "mean":
        return point
    for _ in range(WEISZFELD_STEPS):
        weights = 1 / (x - point).norm(dim=1).clamp(min=1e-8)  # (tokens,)
        previous, point = point, (weights[:, None] * x).sum(dim=0) / weights.sum()
        if (point - previous).norm() <= 1e-6 * point.norm():
            break
    return point


@torch.no_grad()
def resample(
    head: SAEHead, x: Tensor, generator: torch.Generator, optimizer: torch.optim.Optimizer
) -> int:
    """Point dead latents at tokens that the head reconstructs badly; forget their momentum.

    A dead latent's decoder row becomes the direction of a token's error, drawn with probability
    proportional to the squared error; its encoder points there too, with a fifth of the living
    latents' mean norm; its other parameters start anew.

    Args:
        head: with parameters on the CPU or a GPU.
        x: (tokens, d_in), raw.
        generator: on the CPU; the same on every process gives the same latents.
        optimizer: that trains the head.

    Returns:
        How many latents were dead; 0, and nothing is done, where there is no token.

    See: "Towards Monosemanticity" (Anthropic, 2023), appendix on neuron resampling.
    """
    dead = head.dead.nonzero().squeeze(1)  # (dead,)
    if len(dead) == 0 or len(x) == 0:
        return 0
    training = head.training
    head.eval()  # the step's running averages have seen these tokens
    x = x.to(head.W_dec.dtype)
    errors = (x - head.reconstruct(x).x_hat) / head.normalise(x).scale  # (tokens, d_in)
    head.train(training)
    odds = errors.square().sum(dim=1).cpu().double()
    drawn = torch.multinomial(odds, len(dead), replacement=True, generator=generator)
    directions = errors[drawn.to(errors.device)]
    directions /= directions.norm(dim=1, keepdim=True).clamp(min=1e-12)

    living = ~head.dead if not head.dead.all() else head.dead  # without any, as the dead ones are
    living_norm = head.encoder_weight[:, living].norm(dim=0).mean()
    fresh = type(head)(head.config).to(head.W_dec)
    for name, parameter, own in _of_latents(head, dead):
        if name == "W_dec":
            norm = 1.0 if not head.config.tied else RESAMPLED_ENCODER_NORM * living_norm
            values = norm * directions
        elif name == "W_enc":
            values = RESAMPLED_ENCODER_NORM * living_norm * directions.T
        else:
            values = fresh.get_parameter(name)[dead]
        parameter[own] = values.to(parameter.dtype)
    forget(head, dead, optimizer)
    return len(dead)


@torch.no_grad()
def forget(head: SAEHead, latents: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take latents for new ones: without momentum, and as if they had just fired.

    Args:
        head: whose weights stay as they are.
        latents: (latents,) indices.
        optimizer: that trains the head.
    """
    for _, parameter, own in _of_latents(head, latents):
        for moment in optimizer.state.get(parameter, {}).values():
            if moment.shape == parameter.shape:
                moment[own] = 0
    head.tokens_since_fired[latents] = 0


def _of_latents(head: SAEHead, latents: Tensor) -> Iterator[tuple[str, nn.Parameter, tuple]]:
    """Parameters that a latent has a part of, by name, each with the index of these latents'."""
    for name, parameter in head.named_parameters():
        if name == "W_enc":
            yield name, parameter, (slice(None), latents)
        elif name != "b_dec" and len(parameter) == head.config.d_sae:
            yield name, parameter, (latents,)
