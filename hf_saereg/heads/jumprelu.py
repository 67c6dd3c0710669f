"""JumpReLU: a learned threshold a latent, trained through straight-through estimators."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from hf_saereg.heads.base import HeadConfigError, SAEHead, SAEHeadConfig
from hf_saereg.heads.controller import log_error
from hf_saereg.kernels.codes import Above, Codes, Selection

INITIAL_THRESHOLD = 0.1
LEVEL_GAIN = 0.05  # a step; an L0 twice too high raises all thresholds by 3.5 %


class JumpReLUSAE(SAEHead):
    """f = z · 1[z > θ] with θ = exp(log_threshold), S = c · L0 or, with `quadratic_penalty`,
    c (L0 / target_l0 − 1)² of the batch's mean L0, which does not add up over micro-batches.

    Neither step has a gradient with respect to θ; both take the rectangular window of width
    `bandwidth` around it: ∂f/∂θ = −θ/ε · 1[|z − θ| < ε/2] and ∂1[z > θ]/∂θ = −1/ε · 1[…].

    By default z is the pre-activation, as in the paper, and a latent is at work only where
    z > θ − ε/2. With `reference_window` it is the published reference's: z = ReLU(pre-activation)
    for f, and the L0 step takes its window on f, so that θ < ε/2 puts every inactive latent into
    the window and nothing is sparse.

    With `target_l0` the level of all thresholds is steered, too. An optimizer moves them by a
    learning rate a step, which is slower than the activations of a young model grow; and thresholds
    above all activations get no gradient at all.

    See: Rajamanoharan et al. 2024, "Jumping ahead" (arXiv 2407.14435), equations 11 and 12.

    Raises:
        HeadConfigError: for `quadratic_penalty` without `target_l0`.
    """

    architecture = "jumprelu"
    first_coefficient = 0.05
    own_options = ("bandwidth", "reference_window", "quadratic_penalty", "target_l0")
    stackable = True

    def __init__(self, config: SAEHeadConfig) -> None:
        if config.quadratic_penalty and config.target_l0 is None:
            raise HeadConfigError(
                f"quadratic_penalty at {config.hook_name} needs target_l0, the L0 it pulls towards."
            )
        super().__init__(config)
        initial = torch.full((config.d_sae,), INITIAL_THRESHOLD)
        self.log_threshold = nn.Parameter(initial.log())

    def saelens_weights(self) -> dict[str, Tensor]:
        """With `threshold` in place of its logarithm."""
        weights = self.inference_weights()
        weights["threshold"] = weights.pop("log_threshold").exp()
        return weights

    def load_saelens_weights(self, weights: dict[str, Tensor]) -> None:
        """Take weights with `threshold` in place of its logarithm, in their dtype."""
        weights = dict(weights)
        super().load_saelens_weights({"log_threshold": weights.pop("threshold").log(), **weights})

    @property
    def threshold(self) -> Tensor:
        """θ, (d_sae,)."""
        return self.log_threshold.exp()

    def selection(self, x: Tensor) -> Selection:
        """Latents above their threshold, or in its window."""
        lowest = self.threshold.detach() - self.config.bandwidth / 2
        if self.config.reference_window:
            # there an inactive latent sits at 0, in the window of every threshold below ε/2
            return Above(torch.where(lowest < 0, -torch.inf, lowest))
        return Above(lowest)

    def activate(self, codes: Codes, selection: Selection) -> Tensor:
        """Pre-activations above their threshold, in the layout of `codes`."""
        z = torch.relu(codes.pre) if self.config.reference_window else codes.pre
        return _Jump.apply(z, codes.at(self.threshold), self.config.bandwidth)

    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """1 for every active latent of a token."""
        z = values if self.config.reference_window else codes.pre
        return _Step.apply(z, codes.at(self.threshold), self.config.bandwidth)

    @torch.no_grad()
    def observe(self, fired: Tensor, tokens: Tensor) -> None:
        """As every head; moves the level of the thresholds towards a target L0."""
        super().observe(fired, tokens)
        if "smoothed_l0" in self._buffers:
            self.log_threshold.add_(LEVEL_GAIN * log_error(self.smoothed_l0, self.config.target_l0))

    def sparsity_loss(self, sparsity: Tensor) -> Tensor:
        """c · L0, or c (L0 / target − 1)², of the mean L0 of the batch."""
        if self.config.quadratic_penalty:
            return self.coefficient * (sparsity / self.config.target_l0 - 1).square()
        return super().sparsity_loss(sparsity)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        window = _window(z, threshold, ctx.bandwidth)
        grad_threshold = -threshold / ctx.bandwidth * window * grad
        return (z > threshold) * grad, grad_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        grad_threshold = -_window(z, threshold, ctx.bandwidth) / ctx.bandwidth * grad
        return None, grad_threshold.sum_to_size(threshold.shape), None


def _window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype)
