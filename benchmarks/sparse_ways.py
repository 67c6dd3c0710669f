"""Which way of computing with few active latents is fastest on a CPU: why the kernel is what it is.

    python -m benchmarks.sparse_ways --shape published

Two tables, per site of a late checkpoint: the decoder (forward, and the gradients of values and
weights) by four libraries' means on the very same codes, and the whole head (forward and backward)
against what `torch.compile` makes of whole arrays.

Notable:
- checkpoints are those of `benchmarks.step`: made there on first use
- contestants take turns, medians are compared, and each result is checked against the first one's
- `torch.compile` needs a C++ compiler, which a user's machine may lack: measured only on request,
  and out of the question for the kernel
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.naive import naive_losses
from benchmarks.shapes import SHAPES
from benchmarks.timing import median_seconds
from benchmarks.training import checkpoints
from hf_saereg.errors import one_sentence_errors
from hf_saereg.heads import SAEHead
from hf_saereg.kernels import Codes, sparse
from hf_saereg.modeling import SAERegGPT2LMHeadModel

Decoder = Callable[[Tensor, Codes, Tensor, Tensor], Tensor]


def by_embedding_bag(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """A bag of decoder rows a token, weighted by the features."""
    latents, starts = codes.latents.long(), codes.offsets[:-1]
    return embedding_bag(latents, W_dec, starts, mode="sum", per_sample_weights=values) + b_dec


def by_csr(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """torch's own compressed sparse rows."""
    size = (len(codes.offsets) - 1, len(W_dec))
    features = torch.sparse_csr_tensor(codes.offsets, codes.latents.long(), values, size)
    return features @ W_dec + b_dec


def by_index_add(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """One decoder row an entry, summed by token."""
    counts = codes.offsets.diff()
    tokens = torch.arange(len(counts)).repeat_interleave(counts)
    rows = values[:, None] * W_dec.index_select(0, codes.latents)  # (entries, d_in)
    return b_dec.repeat(len(counts), 1).index_add(0, tokens, rows)


DECODERS: dict[str, Decoder] = {
    "numba": sparse.decode,
    "embedding_bag": by_embedding_bag,
    "csr": by_csr,
    "index_add": by_index_add,
}


def decoder_seconds(head: SAEHead, x: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each decoder, forward and backward.

    Args:
        head: with few active latents.
        x: (tokens, d_in).
        repeats: rounds of which the median is taken.
    """
    centred = x - head.b_dec.detach()
    selection = head.selection(centred)
    codes = sparse.encode(centred, head.W_enc.detach(), head.b_enc.detach(), selection)
    values = head.activate(codes, selection).detach()
    inputs = [values, head.W_dec.detach(), head.b_dec.detach()]
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    results: dict[str, list[Tensor]] = {}

    def run(name: str) -> None:
        own_values, W_dec, b_dec = (tensor.clone().requires_grad_() for tensor in inputs)
        x_hat = DECODERS[name](own_values, codes, W_dec, b_dec)
        gradients = torch.autograd.grad(x_hat, (own_values, W_dec, b_dec), slope)
        results[name] = [x_hat.detach(), *gradients]

    seconds = median_seconds({name: lambda name=name: run(name) for name in DECODERS}, repeats)
    for result in results.values():
        for found, expected in zip(result, results["numba"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return seconds


def head_seconds(head: SAEHead, x: Tensor, repeats: int, compiled: bool) -> dict[str, float]:
    """Median seconds of the whole head, forward and backward.

    Args:
        head: with few active latents.
        x: (tokens, d_in).
        repeats: rounds of which the median is taken.
        compiled: also by `torch.compile`, of whole arrays.
    """
    whole = torch.compile(naive_losses)  # compiles when it is first called

    def run(name: str) -> None:
        own = x.clone().requires_grad_()
        head.zero_grad()
        if name == "compiled":
            losses = whole(head, own)
        else:
            head.kernel = name
            losses = head.losses(own)
        (losses.reconstruction + losses.sparsity).backward()

    names = ["sparse", "dense", *(["compiled"] if compiled else [])]
    return median_seconds({name: lambda name=name: run(name) for name in names}, repeats)


def main() -> None:
    """Print both tables, milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="published")
    parser.add_argument("--checkpoints", type=Path, help="folder of early, midway and late")
    parser.add_argument("--tokens", type=int, help="of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile; minutes")
    options = parser.parse_args()

    shape = SHAPES[options.shape]
    folder = options.checkpoints or Path("runs/benchmarks") / options.shape
    late = checkpoints(shape, folder)["late"]
    model = SAERegGPT2LMHeadModel.from_pretrained(late).train()
    input_ids = shape.batches(options.tokens or shape.cpu_tokens)[0]
    with torch.no_grad(), model.reading(model.hook_names) as activations:
        model(input_ids=input_ids)
    for head in model.heads:
        x = activations[head.config.hook_name].flatten(0, 1)
        seconds = {
            "decoder": decoder_seconds(head, x, options.repeats),
            "whole head": head_seconds(head, x, options.repeats, options.compile),
        }
        l0 = head.losses(x).statistics.l0
        print(f"{head.config.hook_name}: d_sae {head.config.d_sae}, L0 {l0:.1f}, {len(x)} tokens")
        for what, by_name in seconds.items():
            figures = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in by_name.items())
            print(f"  {what}, ms: {figures}", flush=True)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
