"""TopK: sparsity by construction, `k` latents a token."""

from typing import Any

import torch
from torch import Tensor

from hf_saereg.heads.base import HeadConfigError, SAEHead
from hf_saereg.kernels.codes import Codes, LargestK, Selection


class TopKSAE(SAEHead):
    """f = ReLU of the k largest pre-activations of each token; no sparsity loss.

    ReLU on the selected values as in SAELens; a token with fewer than k positive pre-activations
    has an L0 below k. With `rectified` off a selected negative stays, as in the published code.

    See: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093).
    """

    architecture = "topk"
    sparsity_option = "k"
    own_options = ("rectified", "auxk")
    stackable = True

    def saelens_options(self) -> dict[str, Any]:
        """`k`; features are selected by pre-activation alone.

        Raises:
            HeadConfigError: without `rectified`.
        """
        if not self.config.rectified:
            raise HeadConfigError(
                f"The topk head on {self.config.hook_name} keeps negative values (rectified is "
                "off), which SAELens has no form for; only rectified heads can be saved."
            )
        return super().saelens_options() | {
            "k": self.config.k,
            "rescale_acts_by_decoder_norm": False,
        }

    def selection(self, x: Tensor) -> Selection:
        """The k largest of each token."""
        return LargestK(self.config.k)

    def activate(self, codes: Codes, selection: Selection) -> Tensor:
        """The selected pre-activations, rectified or raw, in the layout of `codes`."""
        return torch.relu(codes.pre) if self.config.rectified else codes.pre

    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """Zero: k is the constraint."""
        return values.new_zeros(())
