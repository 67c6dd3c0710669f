"""The paths that a training step can take, from zeroed gradients to the optimizer's step.

Notable:
- the learning rate is 0: every repeat finds the weights, and so the sparsity, of the checkpoint
- all paths share one model, so that they can take turns
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.naive import compiled_losses, naive
from hf_saereg import kernels
from hf_saereg.heads.bank import HeadBank
from hf_saereg.kernels.chunks import chunk_size
from hf_saereg.kernels.product import PADDING, multiply
from hf_saereg.modeling import SAERegGPT2LMHeadModel, SAERegOutput

PRECISIONS = ("float32", "term_bfloat16", "bfloat16")  # autocast: of nothing, the heads, everything


def load(checkpoint: Path) -> SAERegGPT2LMHeadModel:
    """A checkpoint in training mode, on the GPU where there is one."""
    model = SAERegGPT2LMHeadModel.from_pretrained(checkpoint).train()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def path_names(device: torch.device) -> list[str]:
    """All paths on a device: the plain step, the floor, the naive way, and every kernel of ours.

    On a GPU also the naive way compiled.
    """
    rival = ["compile"] if device.type == "cuda" else []
    fast = kernels.fast_kernel(torch.empty(0, device=device))
    return ["plain", "floor", "naive", *rival, "auto", "dense", *([fast] if fast else [])]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What the step runs under; the heads' own autocast is the model's doing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def adamw(parameters: object, learning_rate: float = 0.0) -> torch.optim.AdamW:
    """The published optimizer, without weight decay."""
    return torch.optim.AdamW(parameters, learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True)


def run_path(
    name: str,
    model: SAERegGPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    input_ids: Tensor,
    precision: str,
    term_step: int = 0,
) -> SAERegOutput:
    """One training step.

    Args:
        name: one of `path_names`.
        model: with heads.
        optimizer: of the language model alone for `plain` and `floor`, of everything otherwise.
        input_ids: (sequences, sequence).
        precision: one of `PRECISIONS`.
        term_step: on it depends which sites and tokens the term covers, where not all.
    """
    with_term = name not in ("plain", "floor")
    if name in kernels.KERNELS:
        for head in model.heads:
            head.kernel = name
    model.term = replace(model.term, term_bf16=precision == "term_bfloat16")
    optimizer.zero_grad()
    with autocast(model.device, precision), _losses_of(name, model.heads):
        output = model(
            input_ids=input_ids, labels=input_ids, compute_term=with_term, term_step=term_step
        )
    loss = output.loss + output.term if with_term else output.loss
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return output


def _losses_of(name: str, heads: HeadBank) -> AbstractContextManager[None]:
    if name == "compile":
        return naive(heads, compiled_losses())
    return naive(heads) if name == "naive" else nullcontext()


@torch.no_grad()
def product(x: Tensor, W_enc: Tensor, precision: str) -> None:
    """One encoder's forward product, in chunks that fit the cache, the fastest way that we know.

    Args:
        x: (tokens, d_in).
        W_enc: (d_in, d_sae).
        precision: one of `PRECISIONS`.
    """
    d_sae = W_enc.shape[1]
    pieces = x.split(chunk_size(x, d_sae))
    if x.device.type == "cpu" and precision == "float32":
        out = x.new_empty(len(pieces[0]), d_sae + PADDING)
        for rows in pieces:
            multiply(rows, W_enc, out=out[: len(rows)])
        return
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    W = W_enc.to(dtype)
    for rows in pieces:
        torch.mm(rows.to(dtype), W)


def steps_by_path(
    model: SAERegGPT2LMHeadModel, input_ids: Tensor, precision: str
) -> dict[str, Callable[[], None]]:
    """A function a path that takes one step.

    Args:
        model: with heads.
        input_ids: (sequences, sequence).
        precision: one of `PRECISIONS`.
    """
    everything = adamw(model.parameters())
    language_model = adamw(model.plain_view().parameters())
    with torch.no_grad(), model.reading(model.heads.hook_names) as activations:
        model(input_ids=input_ids)

    def step(name: str) -> None:
        optimizer = language_model if name in ("plain", "floor") else everything
        run_path(name, model, optimizer, input_ids, precision)
        if name == "floor":
            for head in model.heads:
                product(activations[head.config.hook_name].flatten(0, 1), head.W_enc, precision)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return {name: lambda name=name: step(name) for name in path_names(model.device)}
