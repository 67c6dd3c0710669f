"""The gated sparse autoencoder: one path says which latents are active, another how strongly."""

from types import ModuleType

import torch
from torch import Tensor, nn

from hf_saereg.heads.base import SAEHead, SAEHeadConfig
from hf_saereg.kernels.codes import Above, Codes, Selection


class GatedSAE(SAEHead):
    """π = (x − b_dec) W_enc + b_gate, f = 1[π > 0] · ReLU((x − b_dec) W_enc · exp(r_mag) + b_mag).

    S = c Σ_j ReLU(π_j) ‖W_dec[j]‖₂ with the norm detached, and
    A = ‖x − (ReLU(π) W_dec + b_dec)‖² with decoder and bias detached, so that the gate learns
    without bending the decoder. A selected latent whose magnitude is not positive stays at 0.

    See: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"
    (arXiv 2404.16014).
    """

    architecture = "gated"
    own_options = ("target_l0", "tied")

    def __init__(self, config: SAEHeadConfig) -> None:
        super().__init__(config)
        del self.b_enc
        self.b_gate = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))

    @property
    def encoder_bias(self) -> Tensor:
        """`b_gate`."""
        return self.b_gate

    def selection(self, x: Tensor) -> Selection:
        """Open gates: π > 0."""
        return Above(0.0)

    def activate(self, codes: Codes, selection: Selection) -> Tensor:
        """Magnitudes where the gate is open, in the layout of `codes`."""
        ungated = codes.pre - codes.at(self.b_gate)
        magnitude = torch.relu(ungated * codes.at(self.r_mag.exp()) + codes.at(self.b_mag))
        # a product: on a CPU torch.where and its gradient take many times as long
        return magnitude * (codes.pre > 0)

    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """L1 of the gates, weighted by detached decoder norms, a gate of a token each."""
        decoder_norms = self.W_dec.detach().norm(dim=1)  # (d_sae,)
        gates = torch.relu(codes.pre)
        return gates * codes.at(decoder_norms)

    def auxiliary(self, x: Tensor, codes: Codes, kernel: ModuleType) -> Tensor:
        """Squared error of the reconstruction from the gates alone, summed over tokens."""
        gates = torch.relu(codes.pre)
        x_hat = kernel.decode(gates, codes, self.W_dec.detach(), self.b_dec.detach())
        return (x - x_hat).square().sum()
