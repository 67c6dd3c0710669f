"""TopK: sparsity by construction, `k` latents a token."""

from typing import Any

import torch
from torch import Tensor

from hf_saereg.heads.base import HeadConfigError, SAEHead, SAEHeadConfig
from hf_saereg.kernels.codes import Codes, LargestK, Selection


class TopKSAE(SAEHead):
    """f = ReLU of the k largest pre-activations of each token; no sparsity loss.

    ReLU on the selected values as in SAELens; a token with fewer than k positive pre-activations
    has an L0 below k.

    See: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093).

    Raises:
        HeadConfigError: if k is missing, not positive, or above `d_sae`.
    """

    architecture = "topk"

    def __init__(self, config: SAEHeadConfig) -> None:
        if config.k is None or not 1 <= config.k <= config.d_sae:
            raise HeadConfigError(
                f"k at {config.hook_name} is {config.k}; a topk head needs 1 ≤ k ≤ d_sae "
                f"({config.d_sae})."
            )
        super().__init__(config)

    def saelens_options(self) -> dict[str, Any]:
        """`k`; features are selected by pre-activation alone."""
        return {"k": self.config.k, "rescale_acts_by_decoder_norm": False}

    def selection(self) -> Selection:
        """The k largest of each token."""
        return LargestK(self.config.k)

    def activate(self, codes: Codes) -> Tensor:
        """ReLU of the selected pre-activations, in the layout of `codes`."""
        return torch.relu(codes.pre)

    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """Zero: k is the constraint."""
        return values.new_zeros(())
