"""Drives the coefficient of the sparsity loss so that L0 settles at a target.

Notable:
- L0 answers a change of the coefficient slowly and roughly as a power of it, so both are steered in
  logarithms: a proportional-integral controller in its velocity form,
  Δ log c = K_P (e − e_before) + K_I · e, e = clip(log L0 − log target)
- the proportional part acts on the change of L0 alone: a coefficient that grew while L0 was far
  away falls back as L0 comes near, which is what keeps it from overshooting
- L0 is smoothed first: one batch of text is sparser than another
"""

from torch import Tensor

PROPORTIONAL = 3.0  # thresholds drift on while c is off by a little: less, and they swing
INTEGRAL = 0.02  # a step; a batch twice too dense raises the coefficient by 1.4 %
LARGEST_ERROR = 1.0  # farther away only the integral part acts: c grows by 2 % a step
SMOOTHING = 0.8
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
    error, error_before = (
        (value / target).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
        for value in (smoothed_l0, before)
    )
    coefficient.mul_((PROPORTIONAL * (error - error_before) + INTEGRAL * error).exp())
