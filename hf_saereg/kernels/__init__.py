"""How encode → select → decode and its gradients are computed, and the one place that picks how.

Notable:
- a kernel is a module with `encode` and `decode`; `dense` is the definition, `sparse` returns the
  same values and gradients
- `sparse` is imported when it is first used: it needs numba, which takes a while to load
"""

from importlib import import_module
from types import ModuleType

from torch import Tensor, float32, float64

from hf_saereg.errors import UserError
from hf_saereg.kernels import dense
from hf_saereg.kernels.batch import batch_threshold
from hf_saereg.kernels.codes import Above, Codes, LargestK, Selection

KERNELS = ("auto", "dense", "sparse")

# Density at which both take equally long on a CPU, forward and backward, standard heads, float32
# and bfloat16: 0.35 and 0.28 at d_in 64, d_sae 512; 0.28 and 0.25 at 64 and 4,096; 0.32 and 0.19 at
# 256 and 2,048; 0.12 and 0.06 at 768 and 6,144, where the decoder's rows no longer fit the cache.
_CACHED_WEIGHTS = 2**21
_CROSSOVER = 0.2
_CROSSOVER_UNCACHED = 0.08
_HYSTERESIS = 1.25  # how far beyond the crossover a change of mind begins


def check_name(kernel: str) -> None:
    """Check that there is such a kernel.

    Args:
        kernel: one of `KERNELS`.

    Raises:
        UserError: if it is not.
    """
    if kernel not in KERNELS:
        raise UserError(f"Unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}.")


def pick(kernel: str, density: float, W_enc: Tensor, was_sparse: bool = False) -> ModuleType:
    """The module whose `encode` and `decode` to use.

    Near the crossover it stays with what it was, so that noise of the density changes nothing.

    Args:
        kernel: one of `KERNELS`.
        density: fraction of the latents that the head selects.
        W_enc: (d_in, d_sae), of the dtype and on the device that are computed in.
        was_sparse: what was picked for the batch before.

    Raises:
        UserError: if there is no such kernel.
    """
    check_name(kernel)
    if kernel == "auto":
        fits = W_enc.device.type == "cpu" and W_enc.dtype in (float32, float64)
        crossover = _CROSSOVER if W_enc.numel() <= _CACHED_WEIGHTS else _CROSSOVER_UNCACHED
        limit = crossover * _HYSTERESIS if was_sparse else crossover / _HYSTERESIS
        kernel = "sparse" if fits and density < limit else "dense"
    return import_module(f"hf_saereg.kernels.{kernel}")


def __getattr__(name: str) -> ModuleType:
    if name == "sparse":
        return import_module("hf_saereg.kernels.sparse")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KERNELS",
    "Above",
    "Codes",
    "LargestK",
    "Selection",
    "batch_threshold",
    "check_name",
    "dense",
    "pick",
    "sparse",
]
