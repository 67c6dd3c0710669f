"""Heads of one family and size, trained as one: a step of small ones costs calls, not arithmetic.

Notable:
- the wide head has the latents of all heads, one head after the other; what a family computes
  concerns one latent each, so it computes the same of a wide head; only the two products, in which
  a head meets its own tokens alone, have a kernel of their own, and AuxK goes from head to head
- the heads' parameters become views of the wide head's: an optimizer of those moves both, and
  whatever reads, saves or loads the heads needs to know nothing of this
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hf_saereg import kernels
from hf_saereg.heads.auxk import DeadReaders, auxk_loss
from hf_saereg.heads.base import DENSITY_SAMPLE, SAEHead
from hf_saereg.kernels.codes import Codes, LargestK, Selection

# (tokens, heads · d_sae) elements of a dense step; of 4 times as many the cache holds too few, and
# the heads one by one are up to a third faster
LARGEST = 2**19


class StackLosses(NamedTuple):
    """One pass of all heads.

    Attributes:
        total: () R + S + A of every head, means over tokens, summed over heads.
        fired: (heads, d_sae) tokens on which each latent was active.
        tokens: () of each head.
    """

    total: Tensor
    fired: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class HeadStack:
    """Several heads whose parameters are views of a wide head's.

    Attributes:
        heads: as they were, but for where their parameters are.
        wide: heads · d_sae latents; its `b_dec` is (heads, d_in).
    """

    heads: Sequence[SAEHead]
    wide: SAEHead

    @staticmethod
    def can_hold(heads: Iterable[SAEHead], tokens: int) -> bool:
        """Whether these heads can be stacked, and are small enough to gain by it.

        Args:
            heads: of any number.
            tokens: of a step.
        """
        heads = list(heads)
        configs = [replace(head.config, hook_name="any") for head in heads]
        if len(heads) < 2 or configs.count(configs[0]) < len(heads):
            return False
        config = configs[0]
        return (
            heads[0].stackable
            and config.normalization not in ("layer_norm", "variance")
            and len(heads) * tokens * config.d_sae <= LARGEST
        )

    @classmethod
    def of(cls, heads: Iterable[SAEHead]) -> Self:
        """Stack heads that `can_hold` accepts; moves their parameters.

        Args:
            heads: on one device.
        """
        heads = list(heads)
        first = heads[0]
        with torch.device("meta"):  # draws no random numbers
            wide = type(first)(replace(first.config, d_sae=len(heads) * first.config.d_sae))
        for name, _ in list(wide.named_parameters()):
            own = [head.get_parameter(name).detach() for head in heads]
            axis = 1 if name == "W_enc" else 0
            joined = torch.stack(own) if name == "b_dec" else torch.cat(own, axis)
            parts = joined.unbind() if name == "b_dec" else joined.chunk(len(heads), axis)
            setattr(wide, name, nn.Parameter(joined))
            for head, part in zip(heads, parts, strict=True):
                setattr(head, name, nn.Parameter(part))
        return cls(heads, wide)

    def losses(self, x: Tensor) -> StackLosses:
        """Losses of every head on its own tokens.

        Args:
            x: (heads, tokens, d_in).
        """
        wide, tokens = self.wide, max(x.shape[1], 1)
        centred = x - wide.b_dec[:, None]
        selection = wide.selection(centred)
        kernel = self._pick(centred, selection)
        codes = kernel.encode_stack(centred, wide.encoder_weight, wide.encoder_bias, selection)
        values = wide.activate(codes, selection)
        x_hat = kernel.decode_stack(values, codes, wide.W_dec, wide.b_dec)
        total = mse_loss(x_hat, x, reduction="sum") / tokens
        sparsity = self._by_head(wide.sparsity(codes, values), codes) / tokens
        costs = zip(self.heads, sparsity.unbind(), strict=True)
        total = total + torch.stack([head.sparsity_loss(mean) for head, mean in costs]).sum()
        if wide.config.auxk:
            total = total + self._auxk(centred, (x - x_hat).detach()) / tokens
        fired = codes.counts(values.detach() != 0, wide.config.d_sae)
        return StackLosses(
            total, fired.view(len(self.heads), -1), torch.tensor(x.shape[1], device=x.device)
        )

    def _auxk(self, centred: Tensor, error: Tensor) -> Tensor:
        """() sum of AuxK's losses: few latents are dead, another number of each head."""
        wide, heads = self.wide, len(self.heads)
        readers = zip(
            wide.encoder_weight.chunk(heads, dim=1),
            wide.encoder_bias.chunk(heads),
            wide.W_dec.chunk(heads),
            strict=True,
        )
        each = zip(self.heads, readers, centred, error, strict=True)
        return torch.stack(
            [auxk_loss(head, DeadReaders(*own), tokens, lost) for head, own, tokens, lost in each]
        ).sum()

    def _by_head(self, elements: Tensor, codes: Codes) -> Tensor:
        """(heads,) sums of what concerns one latent of one token each; () is 0."""
        heads, d_sae = len(self.heads), self.heads[0].config.d_sae
        if elements.ndim == 0:
            return elements.expand(heads)
        if codes.latents is None:
            return elements.unflatten(1, (heads, d_sae)).sum(dim=(0, 2))
        return elements.new_zeros(heads).index_add(0, codes.latents // d_sae, elements)

    @torch.no_grad()
    def _pick(self, centred: Tensor, selection: Selection) -> ModuleType:
        """The kernel for all of them, from their mean density; every head remembers it."""
        head, weight = self.heads[0], self.wide.encoder_weight
        if kernels.fast_kernel(weight) != "sparse":  # Triton's has no stack
            return kernels.dense
        was_sparse = bool(head.was_sparse)
        kernel = kernels.pick(head.kernel, self._density(centred, selection), weight, was_sparse)
        if was_sparse != (kernel is not kernels.dense):
            for each in self.heads:
                each.was_sparse.fill_(not was_sparse)
        return kernel

    def _density(self, centred: Tensor, selection: Selection) -> float:
        if isinstance(selection, LargestK):
            return selection.k / self.heads[0].config.d_sae
        sample = centred[:, :: max(1, centred.shape[1] // DENSITY_SAMPLE)]
        wide = self.wide
        pre = kernels.dense.encode_stack(sample, wide.encoder_weight, wide.encoder_bias, selection)
        return (pre.pre > selection.threshold).double().mean().item()
