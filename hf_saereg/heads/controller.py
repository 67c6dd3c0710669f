"""Drives the coefficient of the sparsity loss so that L0 settles at a target.

Notable:
- L0 answers a change of the coefficient slowly and roughly as a power of it, so both are steered in
  logarithms: a proportional-integral controller in its velocity form,
  Δ log c = K_P (e − e_before) + K_I · clip(e), e = log L0 − log target
- the proportional part acts on the change of L0 alone: a coefficient that grew while L0 was far
  away falls back as L0 comes near, which is what keeps it from overshooting
- latents that were driven out come back slowly whatever c is, so c grows by a few percent a step at
  most; but near the target it answers firmly, because a model in training needs a c that grows all
  along (by half a percent a step in a short run), and lags behind it by e = 0.005 / K_I
- L0 is smoothed first: one batch of text is sparser than another
"""

from torch import Tensor

PROPORTIONAL = 4.0  # thresholds drift on while c is off by a little: less, and they swing
INTEGRAL = 0.08  # a step; a batch a tenth too dense raises the coefficient by 0.8 %
LARGEST_DRIFT = 0.25  # of e in the integral part: c grows by 2 % a step at most
LARGEST_ERROR = 1.0  # farther away only the integral part acts
SMOOTHING = 0.8
COEFFICIENTS = (1e-6, 1e6)  # farther away it would take as long to come back
SMALLEST_L0 = 0.01  # below it nothing more is to be learnt from a logarithm
FIRST_COEFFICIENT = 0.01  # where none was given; the way to the right one takes a few hundred steps


def steer(coefficient: Tensor, smoothed_l0: Tensor, l0: Tensor, target: float) -> None:
    """One step of the controller, in place.

    Args:
        coefficient: () c.
        smoothed_l0: () moving average of L0, 0 before the first step.
        l0: () mean L0 of the step's tokens, on all processes.
        target: what L0 shall be.
    """
    l0 = l0.to(smoothed_l0).clamp(min=SMALLEST_L0)
    before = smoothed_l0.where(smoothed_l0 > 0, l0)
    smoothed_l0.copy_(SMOOTHING * before + (1 - SMOOTHING) * l0)
    error, error_before = (log_error(value, target) for value in (smoothed_l0, before))
    drift = error.clamp(-LARGEST_DRIFT, LARGEST_DRIFT)
    coefficient.mul_((PROPORTIONAL * (error - error_before) + INTEGRAL * drift).exp())
    coefficient.clamp_(*COEFFICIENTS)


def log_error(l0: Tensor, target: float) -> Tensor:
    """e, (): how far L0 is above its target, in logarithms, clipped."""
    return (l0 / target).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
