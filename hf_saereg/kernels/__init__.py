"""How encode → select → decode and its gradients are computed, and the one place that picks how.

Notable:
- a kernel is a module with `encode` and `decode`; `dense` is the definition, `sparse` (on a CPU)
  and `triton` (on a GPU) return the same values and gradients
- these two are imported when they are first used: one needs numba, which takes a while to load,
  the other an extra
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from hf_saereg.errors import UserError
from hf_saereg.kernels import dense
from hf_saereg.kernels.batch import batch_threshold
from hf_saereg.kernels.codes import Above, Codes, LargestK, Selection

KERNELS = ("auto", "dense", "sparse", "triton")

# Density at which both take equally long on a CPU, forward and backward, standard heads, float32
# and bfloat16: 0.35 and 0.28 at d_in 64, d_sae 512; 0.28 and 0.25 at 64 and 4,096; 0.32 and 0.19 at
# 256 and 2,048; 0.12 and 0.06 at 768 and 6,144, where the decoder's rows no longer fit the cache.
_CACHED_WEIGHTS = 2**21
_CROSSOVER = 0.2
_CROSSOVER_UNCACHED = 0.08
# Not measured: chosen so low that gathering the active rows must win against the dense products.
_CROSSOVER_GPU = 0.005
_HYSTERESIS = 1.25  # how far beyond the crossover a change of mind begins


def check(kernel: str, device: torch.device) -> None:
    """Check that there is such a kernel, and that it runs on a device.

    Args:
        kernel: one of `KERNELS`.
        device: where the heads are.

    Raises:
        UserError: if it does not.
    """
    if kernel not in KERNELS:
        raise UserError(f"Unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}.")
    if kernel == "sparse" and device.type != "cpu":
        raise UserError(
            f"The kernel 'sparse' runs on a CPU, but the heads are on {device}; choose auto, dense "
            "or triton."
        )
    if kernel == "triton":
        _check_triton(device)


def _check_triton(device: torch.device) -> None:
    if not _triton_installed():
        raise UserError(
            "The kernel 'triton' needs the package triton, which is not installed; run "
            "pip install 'hf-saereg[triton]', or choose auto, dense or sparse."
        )
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise UserError(
            f"The kernel 'triton' needs a GPU, but the heads are on {device}; choose auto, dense "
            "or sparse, or set TRITON_INTERPRET=1 to run it, slowly, in Triton's interpreter."
        )


@cache
def _triton_installed() -> bool:
    spec = find_spec("triton")
    return spec is not None and spec.origin is not None  # a mere folder of that name has none


def fast_kernel(W_enc: Tensor) -> str | None:
    """The kernel that does work only for active latents where such a weight is; None if none does.

    Args:
        W_enc: (d_in, d_sae), of the dtype and on the device that are computed in.
    """
    if W_enc.device.type == "cpu" and W_enc.dtype in (torch.float32, torch.float64):
        return "sparse"
    if W_enc.device.type == "cuda" and _triton_installed():
        return "triton"
    return None


def pick(kernel: str, density: float, W_enc: Tensor, was_sparse: bool = False) -> ModuleType:
    """The module whose `encode` and `decode` to use.

    Near the crossover it stays with what it was, so that noise of the density changes nothing.

    Args:
        kernel: one of `KERNELS`.
        density: fraction of the latents that the head selects.
        W_enc: (d_in, d_sae), of the dtype and on the device that are computed in.
        was_sparse: whether the batch before was given to `fast_kernel`.

    Raises:
        UserError: if there is no such kernel, or it does not run there.
    """
    check(kernel, W_enc.device)
    if kernel == "auto":
        fast, crossover = fast_kernel(W_enc), _crossover(W_enc)
        limit = crossover * _HYSTERESIS if was_sparse else crossover / _HYSTERESIS
        kernel = fast if fast and density < limit else "dense"
    return import_module(f"hf_saereg.kernels.{kernel}")


def _crossover(W_enc: Tensor) -> float:
    if W_enc.device.type == "cuda":
        return _CROSSOVER_GPU
    return _CROSSOVER if W_enc.numel() <= _CACHED_WEIGHTS else _CROSSOVER_UNCACHED


def __getattr__(name: str) -> ModuleType:
    if name in ("sparse", "triton"):
        return import_module(f"hf_saereg.kernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KERNELS",
    "Above",
    "Codes",
    "LargestK",
    "Selection",
    "batch_threshold",
    "check",
    "dense",
    "fast_kernel",
    "pick",
    "sparse",
    "triton",
]
