"""Floating-point operations of a training step, counted on paper, a token of its text.

    language model    3 × (2 × weights + 4 × layers × width × context)
    a head            2 × d_in × 6 d_sae, or 2 × d_in × (d_sae + 5 L0) where it is sparse
    a term            all heads × token_fraction × sites_per_step / sites
    a spliced loss    language model + all heads × splice_sites / sites

Notable:
- a product costs two a weight, forward; the backward pass costs twice the forward one
- attention's two products run over the whole context, though half of it is masked
- weights are those that are multiplied by: the unembedding is, looking up an embedding is not;
  norms, biases, softmax and activation functions are left out
- a head's six products are encoder and decoder, forward once and backward twice; where only active
  latents are computed the encoder's forward product alone stays dense
- the same as `torch.utils.flop_counter` counts (tests compare), for language models and dense heads

See: Chowdhery et al. 2022, arXiv 2204.02311, appendix B, whose 6 N + 12 L H Q T this is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PASSES = 3  # forward once, backward twice as much


class StepFlops(NamedTuple):
    """Of a training step, forward and backward, a token of its text.

    Attributes:
        language: of the language model, twice where a loss is spliced.
        heads: of all of them together.
    """

    language: float
    heads: float


def block_weights(n_layer: int, width: int, inner: int, mlp_matrices: int = 2) -> int:
    """Of all matrices that the blocks of a transformer multiply by.

    Args:
        n_layer: number of blocks.
        width: of the stream.
        inner: of an MLP.
        mlp_matrices: 3 with a gate.
    """
    return n_layer * (4 * width**2 + mlp_matrices * width * inner)


def forward_flops(weights: int, n_layer: int, width: int, context: int) -> int:
    """Forward pass of a language model, a token of a full context.

    Args:
        weights: that are multiplied by, the unembedding's among them.
        n_layer: number of blocks.
        width: of attention, all heads together.
        context: tokens.
    """
    return 2 * weights + 4 * n_layer * width * context


def gpt2_flops(config: Mapping[str, Any]) -> int:
    """Forward and backward pass of a GPT-2, a token of a full context.

    Args:
        config: `config.json`.
    """
    width, n_layer = config["n_embd"], config["n_layer"]
    weights = block_weights(n_layer, width, config.get("n_inner") or 4 * width)
    weights += config["vocab_size"] * width
    return PASSES * forward_flops(weights, n_layer, width, config["n_positions"])


def head_flops(d_in: int, d_sae: int, l0: float | None = None) -> float:
    """Forward and backward pass of a head, a token that it reads.

    Args:
        d_in: width of the stream.
        d_sae: latents.
        l0: active latents, where only they are computed past the encoder; None for all.
    """
    return 2 * d_in * (6 * d_sae if l0 is None else d_sae + 5 * l0)


def step_flops(language: float, heads: Sequence[float], options: Mapping[str, Any]) -> StepFlops:
    """A training step with the term, and the spliced loss if there is one.

    Args:
        language: of one pass, as `gpt2_flops` has it.
        heads: of each, as `head_flops` has it; none for a model without a term.
        options: of the run, those of `TermOptions` among them; what is missing has its default.
    """
    number = max(len(heads), 1)
    share = options.get("token_fraction", 1.0) * (options.get("sites_per_step") or number) / number
    passes = 1
    if heads and options.get("splice_weight"):
        passes += 1
        share += (options.get("splice_sites") or number) / number
    return StepFlops(passes * language, share * sum(heads))
