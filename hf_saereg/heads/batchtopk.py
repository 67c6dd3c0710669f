"""BatchTopK: k latents a token on average over a batch, a fixed threshold at inference."""

from typing import Any

import torch
from torch import Tensor

from hf_saereg import kernels
from hf_saereg.heads.base import SAEHead
from hf_saereg.kernels.codes import Above, Codes, Selection

THRESHOLD_MOMENTUM = 0.99


class BatchTopKSAE(SAEHead):
    """f = ReLU of the k · tokens largest pre-activations of a batch; no sparsity loss.

    In training the batch decides; a running mean of the smallest value it selected is kept, and is
    the threshold in evaluation mode, where a token's features do not depend on its neighbours; on
    several processes it is of the first one's tokens. Saved as a JumpReLU with that threshold.

    See: Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410).
    """

    architecture = "batchtopk"
    sparsity_option = "k"
    own_options = ("auxk",)

    def initial_training_state(self) -> dict[str, Tensor]:
        """With `running_threshold`, (), negative until the first batch has been seen."""
        return super().initial_training_state() | {"running_threshold": torch.tensor(-1.0)}

    def saelens_options(self) -> dict[str, Any]:
        """SAELens reads it as a JumpReLU."""
        return super().saelens_options() | {"architecture": "jumprelu"}

    def saelens_weights(self) -> dict[str, Tensor]:
        """With the running threshold, the same for all latents, as `threshold`."""
        threshold = self.running_threshold.clamp(min=0)
        return self.inference_weights() | {"threshold": threshold.expand(self.config.d_sae)}

    def load_saelens_weights(self, weights: dict[str, Tensor]) -> None:
        """Take weights with `threshold` in place of the running one."""
        weights = dict(weights)
        threshold = weights.pop("threshold")[0].clone()
        super().load_saelens_weights({"running_threshold": threshold, **weights})

    def selection(self, x: Tensor) -> Selection:
        """In training what the batch selects, in evaluation what exceeds the running threshold."""
        if not self.training:
            return Above(self.running_threshold.clamp(min=0))
        threshold = kernels.batch_threshold(
            x, self.encoder_weight, self.encoder_bias, self.config.k * len(x)
        ).clamp(min=0)
        self._follow(threshold)
        return Above(threshold)

    @torch.no_grad()
    def _follow(self, threshold: Tensor) -> None:
        if self.running_threshold < 0:
            self.running_threshold.copy_(threshold)
        else:
            self.running_threshold.lerp_(
                threshold.to(self.running_threshold), 1 - THRESHOLD_MOMENTUM
            )

    def activate(self, codes: Codes, selection: Selection) -> Tensor:
        """ReLU of the pre-activations that were selected, in the layout of `codes`."""
        return torch.where(codes.pre > selection.threshold, torch.relu(codes.pre), 0.0)

    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """Zero: k is the constraint."""
        return values.new_zeros(())
