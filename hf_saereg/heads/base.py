"""What every sparse autoencoder family shares: parameters, losses, statistics.

Notable:
- a family declares three things: which latents it selects, their values, and what they cost
  (`selection`, `activate`, `sparsity`); the kernels do the rest
- losses are means over the tokens given; padding is dropped before a head ever sees it
- `SiteStatistics` are sums, so they add up over batches and processes without rounding tricks
- names are the field's: `d_in`, `d_sae`, `W_enc`, `b_enc`, `W_dec`, `b_dec`, `hook_name`
"""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hf_saereg import kernels
from hf_saereg.errors import UserError
from hf_saereg.kernels.chunks import chunk_size, in_chunks
from hf_saereg.kernels.codes import Codes, LargestK, Selection

logger = logging.getLogger(__name__)

# enough tokens to tell dense from sparse, few enough to cost well under a percent of a step
DENSITY_SAMPLE = 64


class HeadConfigError(UserError):
    """A head was described in a way that cannot work; the message says how to fix it."""


@dataclass
class SAEHeadConfig:
    """One sparse autoencoder."""

    architecture: str  # a name in the registry of hf_saereg.heads
    hook_name: str  # where it sits, as TransformerLens names it, e.g. blocks.0.hook_resid_pre
    d_in: int  # width of the residual stream
    d_sae: int  # number of latents
    sparsity_coefficient: float = 0.0  # c, weight of the sparsity loss (families with a penalty)
    k: int | None = None  # latents kept per token (TopK)
    rectified: bool = True  # ReLU on the selected values (TopK); without it SAELens has no form
    bandwidth: float = 0.1  # ε, width of the straight-through window (JumpReLU)
    reference_window: bool = False  # the published code's window instead of the paper's (JumpReLU)
    reconstruction_weight: float = 1.0  # λ, weight of R + A in the regularization term

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae"):
            size = getattr(self, name)
            if size <= 0:
                raise HeadConfigError(
                    f"{name} at {self.hook_name} is {size}; it must be at least 1."
                )
        for name in ("sparsity_coefficient", "reconstruction_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise HeadConfigError(
                    f"{name} at {self.hook_name} is {weight}; it must be a finite number ≥ 0."
                )


class SiteStatistics(NamedTuple):
    """Sums over tokens, all detached, from which every logged figure of a site follows.

    Attributes:
        tokens: () number of tokens.
        squared_error: () sum of ‖x − x̂‖².
        x_sum: (d_in,) sum of x.
        x_square: () sum of ‖x‖².
        x_norm: () sum of ‖x‖.
        fired: (d_sae,) number of tokens on which each latent was active.
    """

    tokens: Tensor
    squared_error: Tensor
    x_sum: Tensor
    x_square: Tensor
    x_norm: Tensor
    fired: Tensor

    def merged(self, other: Self) -> Self:
        """Statistics of the tokens of both."""
        return type(self)(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def l0(self) -> float:
        """Mean number of active latents a token."""
        return (self.fired.sum() / self.tokens).item()

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; predicting the mean of x scores exactly 1."""
        variance = self.x_square - self.x_sum.square().sum() / self.tokens
        return (self.squared_error / variance).item()

    @property
    def dead_fraction(self) -> float:
        """Fraction of latents that were active on none of the tokens."""
        return (self.fired == 0).double().mean().item()

    @property
    def mean_norm(self) -> float:
        """Mean over tokens of ‖x‖."""
        return (self.x_norm / self.tokens).item()


class Reconstruction(NamedTuple):
    """One pass of a head over tokens, sums over them.

    Attributes:
        x_hat: (tokens, d_in).
        squared_error: () sum of ‖x − x̂‖².
        sparsity: () sum of the sparsity loss, with its coefficient.
        auxiliary: () sum of the auxiliary loss.
        statistics: detached sums.
    """

    x_hat: Tensor
    squared_error: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    statistics: SiteStatistics


class SAELosses(NamedTuple):
    """Losses of one head, each () and a mean over tokens.

    Attributes:
        reconstruction: R, mean of ‖x − x̂‖².
        sparsity: S, with its coefficient.
        auxiliary: A.
        statistics: sums of the same tokens.
    """

    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    statistics: SiteStatistics


class SAEHead(nn.Module, ABC):
    """A sparse autoencoder on one site: x → features → x̂.

    `W_dec` starts Kaiming-uniform with fan-in `d_in` (bound √(6 / d_in)), `W_enc` as its
    transpose, biases at 0: the published initialisation.

    Args:
        config: shape, place and sparsity of the head.

    Raises:
        HeadConfigError: if the family lacks something in `config`.
    """

    architecture: ClassVar[str]
    sparsity_option: ClassVar[str] = "sparsity_coefficient"  # what sets the sparsity; else `k`

    def __init__(self, config: SAEHeadConfig) -> None:
        k = config.k
        if self.sparsity_option == "k" and (k is None or not 1 <= k <= config.d_sae):
            raise HeadConfigError(
                f"k at {config.hook_name} is {k}; a {self.architecture} head needs 1 ≤ k ≤ d_sae "
                f"({config.d_sae})."
            )
        super().__init__()
        self.config = config
        self.kernel = "auto"  # how losses are computed: see hf_saereg.kernels.pick
        bound = math.sqrt(6 / config.d_in)
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in).uniform_(-bound, bound))
        self.W_enc = nn.Parameter(
            self.W_dec.detach().T.clone(memory_format=torch.contiguous_format)
        )
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        # which kernel `auto` last picked in training: a resumed run must pick the same again
        self.register_buffer("was_sparse", torch.tensor(0, dtype=torch.uint8))

    @property
    def encoder_bias(self) -> Tensor:
        """(d_sae,) bias of the pre-activations that select latents."""
        return self.b_enc

    @abstractmethod
    def selection(self, x: Tensor) -> Selection:
        """Which latents can have a value or a derivative other than zero.

        Args:
            x: (tokens, d_in) what the encoder reads, `b_dec` subtracted.
        """

    @abstractmethod
    def activate(self, codes: Codes, selection: Selection) -> Tensor:
        """Feature activations in the layout of `codes`; 0 where a latent was not selected.

        Args:
            codes: pre-activations; dense codes hold those that `Above` did not select, too.
            selection: what they were selected by.
        """

    @abstractmethod
    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """Sparsity loss with its coefficient, () and a **sum** over tokens."""

    def auxiliary(self, x: Tensor, codes: Codes, kernel: ModuleType) -> Tensor:
        """Auxiliary loss, () and a **sum** over tokens; none unless a family has one.

        Args:
            x: (tokens, d_in).
            codes: of x.
            kernel: whose `decode` reads the layout of `codes`.
        """
        return x.new_zeros(())

    def saelens_options(self) -> dict[str, Any]:
        """What SAELens's configuration holds beyond, or instead of, the common fields.

        Raises:
            HeadConfigError: if SAELens has no architecture that computes what this head does.
        """
        return {}

    def saelens_weights(self) -> dict[str, Tensor]:
        """Weights by SAELens's names: all that inference needs."""
        weights = self.state_dict()
        del weights["was_sparse"]
        return weights

    def load_saelens_weights(self, weights: dict[str, Tensor]) -> None:
        """Take weights that `saelens_weights` returned, in their dtype.

        Args:
            weights: of the right names and shapes.
        """
        self.load_state_dict(weights, assign=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # weights that come without it, such as SAELens's, start as a fresh head does
        state_dict.setdefault(f"{prefix}was_sparse", torch.tensor(0, dtype=torch.uint8))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations, (..., d_sae), of activations x, (..., d_in)."""
        flat = x.reshape(-1, self.config.d_in)  # (tokens, d_in)
        centred = flat - self.b_dec
        selection = self.selection(centred)
        codes = kernels.dense.encode(centred, self.W_enc, self.encoder_bias, selection)
        return self.activate(codes, selection).view(*x.shape[:-1], self.config.d_sae)

    def decode(self, features: Tensor) -> Tensor:
        """Reconstruction, (..., d_in), of feature activations (..., d_sae)."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x, (..., d_in)."""
        return self.decode(self.encode(x))

    def reconstruct(self, x: Tensor) -> Reconstruction:
        """Reconstruction by the kernel that losses use, with what it cost.

        Args:
            x: (tokens, d_in), without padding; computed in the dtype of the parameters.
        """
        x = x.to(self.W_enc.dtype)
        centred = x - self.b_dec
        selection = self.selection(centred)
        kernel = self._pick(centred, selection)
        one_pass = partial(self._pass, kernel, selection)
        if kernel is kernels.dense:
            one_pass = partial(in_chunks, one_pass, chunk_size(x, self.config.d_sae))
        x_hat, sparsity, auxiliary, fired = one_pass(x, centred)
        squared_error = mse_loss(x_hat, x, reduction="sum")
        return Reconstruction(
            x_hat=x_hat,
            squared_error=squared_error,
            sparsity=sparsity,
            auxiliary=auxiliary,
            statistics=_statistics(x.detach(), squared_error.detach(), fired),
        )

    def _pass(
        self, kernel: ModuleType, selection: Selection, x: Tensor, centred: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x̂, the sums of sparsity and auxiliary loss, and how often each latent fired."""
        codes = kernel.encode(centred, self.W_enc, self.encoder_bias, selection)
        values = self.activate(codes, selection)
        sparsity = self.sparsity(codes, values)
        auxiliary = self.auxiliary(x, codes, kernel)
        # last, so that a backward pass that computes this again stops before the product
        x_hat = kernel.decode(values, codes, self.W_dec, self.b_dec)  # (tokens, d_in)
        fired = codes.counts(values.detach() != 0, self.config.d_sae)
        return x_hat, sparsity, auxiliary, fired

    def losses(self, x: Tensor) -> SAELosses:
        """Losses on the tokens x.

        Args:
            x: (tokens, d_in), without padding; computed in the dtype of the parameters.

        Returns:
            Means over tokens; all zero, and attached to the graph, when there is no token.
        """
        reconstruction = self.reconstruct(x)
        tokens = max(len(x), 1)
        return SAELosses(
            reconstruction=reconstruction.squared_error / tokens,
            sparsity=reconstruction.sparsity / tokens,
            auxiliary=reconstruction.auxiliary / tokens,
            statistics=reconstruction.statistics,
        )

    @torch.no_grad()
    def folded(self, scale: float) -> Self:
        """A copy that reads x as this head reads `scale · x`, with the same features.

        Args:
            scale: what activations were multiplied by in training.
        """
        copy = type(self)(self.config).to(self.W_enc)
        copy.load_state_dict(self.state_dict())
        copy.kernel = self.kernel
        copy.W_enc.mul_(scale)
        copy.W_dec.div_(scale)
        copy.b_dec.div_(scale)
        return copy.eval()

    @torch.no_grad()
    def _pick(self, centred: Tensor, selection: Selection) -> ModuleType:
        """The kernel for these tokens; a change of mind in training is logged and remembered."""
        if self.kernel != "auto" or centred.device.type != "cpu":  # density does not matter
            return kernels.pick(self.kernel, 1.0, self.W_enc)
        density, was_sparse = self._density(centred, selection), bool(self.was_sparse)
        kernel = kernels.pick(self.kernel, density, self.W_enc, was_sparse)
        if self.training and was_sparse != (kernel is not kernels.dense):
            self.was_sparse.fill_(not was_sparse)
            site, names = self.config.hook_name, ("dense", "sparse")
            old, new = names[was_sparse], names[not was_sparse]
            logger.info("%s: density %.3f, kernel %s → %s", site, density, old, new)
        return kernel

    def _density(self, centred: Tensor, selection: Selection) -> float:
        """Fraction of latents selected, from a few tokens."""
        if isinstance(selection, LargestK):
            return selection.k / self.config.d_sae
        if len(centred) == 0:
            return 1.0
        sample = centred[:: max(1, len(centred) // DENSITY_SAMPLE)]
        pre = kernels.dense.encode(sample, self.W_enc, self.encoder_bias, selection).pre
        return (pre > selection.threshold).double().mean().item()


def _statistics(x: Tensor, squared_error: Tensor, fired: Tensor) -> SiteStatistics:
    # in double precision: a variance is a small difference of large sums
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)  # (tokens,)
    return SiteStatistics(
        tokens=torch.tensor(len(x), device=x.device),
        squared_error=squared_error.double(),
        x_sum=x.sum(dim=0, dtype=torch.float64),
        x_square=norms.square().sum(),
        x_norm=norms.sum(),
        fired=fired,
    )
