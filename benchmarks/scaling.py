"""What one head costs, forward and backward, against its number of latents and against L0.

Notable:
- heads are fitted to the activations at the last site of the late checkpoint, and calibrated to the
  same L0 (`training.shift_to_l0`); one head serves all points of the L0 axis
- `product` is the encoder product alone: the floor of any exact step
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.naive import compiled_losses, naive_losses
from benchmarks.paths import load, path_names, product
from benchmarks.shapes import Shape
from benchmarks.timing import median_seconds
from benchmarks.training import TARGET_L0, fitted_head, shift_to_l0
from hf_saereg.heads import SAEHead

SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of the shape's largest d_sae
L0S = (5, 10, 20, 40, 80, 160)


def measure_scaling(
    checkpoint: Path, shape: Shape, tokens: int, precision: str, repeats: int, turns: int
) -> dict[str, Any]:
    """Seconds of single heads by path, and what the last doubling of d_sae adds.

    Args:
        checkpoint: the late one.
        shape: of model and heads.
        tokens: of a step.
        precision: one of `paths.PRECISIONS`.
        repeats: rounds of which the medians of `by_d_sae` and `by_l0` are taken.
        turns: rounds of which that of `doubling` is taken: a difference of two medians needs more.
    """
    x = _last_activations(checkpoint, shape, tokens)
    sizes = [round(scale * max(shape.d_sae)) for scale in SCALES]
    heads = {d_sae: fitted_head(x.detach(), d_sae, TARGET_L0) for d_sae in sizes}

    def point(head: SAEHead) -> dict[str, Any]:
        paths = _paths(head, x, precision)
        return _of(head, x) | {"seconds": median_seconds(paths, repeats)}

    by_d_sae = [point(head) for head in heads.values()]
    doubling = measure_doubling([heads[d_sae] for d_sae in sizes[-2:]], x, precision, turns)
    head, by_l0 = heads[max(shape.d_sae)], []
    for l0 in L0S:
        shift_to_l0(head, x.detach(), l0)
        by_l0.append(point(head))
    return {"by_d_sae": by_d_sae, "by_l0": by_l0, "doubling": doubling}


def measure_doubling(heads: list[SAEHead], x: Tensor, precision: str, turns: int) -> dict[str, Any]:
    """What one head costs more than a smaller one, in units of what its encoder product does.

    Both heads and their products take turns in one run.

    Args:
        heads: the smaller and the larger one.
        x: (tokens, d_in), with gradient.
        precision: one of `paths.PRECISIONS`.
        turns: rounds of which medians are taken.
    """
    contestants = {
        (name, i): step
        for i, head in enumerate(heads)
        for name, step in _paths(head, x, precision).items()
        if name not in ("naive", "compile", "dense")
    }
    seconds = median_seconds(contestants, turns)
    names = dict.fromkeys(name for name, _ in contestants)
    added = {name: seconds[name, 1] - seconds[name, 0] for name in names}
    return {
        "heads": [_of(head, x) for head in heads],
        "turns": turns,
        "seconds": {name: [seconds[name, i] for i in (0, 1)] for name in names},
        "added_over_product": {name: added[name] / added["product"] for name in names},
    }


def _last_activations(checkpoint: Path, shape: Shape, tokens: int) -> Tensor:
    """(tokens, d_in) at the last site, with gradient."""
    model = load(checkpoint)
    site, input_ids = model.hook_names[-1], shape.batches(tokens)[0].to(model.device)
    with torch.no_grad(), model.reading([site]) as activations:
        model(input_ids=input_ids)
    return activations[site].flatten(0, 1).requires_grad_()


@torch.no_grad()
def _of(head: SAEHead, x: Tensor) -> dict[str, float]:
    return {"d_sae": head.config.d_sae, "l0": head.losses(x).statistics.l0}


def _paths(head: SAEHead, x: Tensor, precision: str) -> dict[str, Callable[[], object]]:
    """A function a path that takes one step of the head, and the encoder product."""

    def step(path: str) -> None:
        head.zero_grad()
        x.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision != "float32"):
            if path in ("naive", "compile"):
                losses = (compiled_losses() if path == "compile" else naive_losses)(head, x)
            else:
                head.kernel = path
                losses = head.losses(x)
        (losses.reconstruction + losses.sparsity).backward()
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    names = [name for name in path_names(x.device) if name not in ("plain", "floor", "auto")]
    paths = {path: lambda path=path: step(path) for path in names}
    return paths | {"product": lambda: product(x, head.W_enc, precision)}
