"""The standard sparse autoencoder: ReLU and an L1 penalty weighted by decoder norms."""

import torch
from torch import Tensor

from hf_saereg.heads.base import SAEHead
from hf_saereg.kernels.codes import Above, Codes, Selection


class StandardSAE(SAEHead):
    """f = ReLU((x − b_dec) W_enc + b_enc), S = c Σ_j f_j ‖W_dec[j]‖₂ with the norm differentiated.

    See: "Towards Monosemanticity" (Anthropic, 2023) and its April 2024 update.
    """

    architecture = "standard"
    own_options = ("target_l0", "tied")
    stackable = True

    def selection(self, x: Tensor) -> Selection:
        """Positive pre-activations."""
        return Above(0.0)

    def activate(self, codes: Codes, selection: Selection) -> Tensor:
        """ReLU of the pre-activations, in the layout of `codes`."""
        return torch.relu(codes.pre)

    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """L1 of the features, weighted by decoder norms, a feature of a token each."""
        decoder_norms = self.W_dec.norm(dim=1)  # (d_sae,)
        return values * codes.at(decoder_norms)
