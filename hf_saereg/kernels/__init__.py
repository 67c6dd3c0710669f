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

# Density at which both take equally long, forward and backward, d_in 64, 16,384 tokens (8,192 for
# d_sae 4,096), 2 cores: 0.3 in float32 and 0.2 in bfloat16 at d_sae 512; between 0.2
# and 0.3 in both at 4,096.
_CROSSOVER = 0.2


def check_name(kernel: str) -> None:
    """Check that there is such a kernel.

    Args:
        kernel: one of `KERNELS`.

    Raises:
        UserError: if it is not.
    """
    if kernel not in KERNELS:
        raise UserError(f"Unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}.")


def pick(kernel: str, density: float, x: Tensor) -> ModuleType:
    """The module whose `encode` and `decode` to use.

    Stateless: near the crossover both kernels cost the same and return the same, so that changing
    one's mind from step to step is harmless.

    Args:
        kernel: one of `KERNELS`.
        density: fraction of the latents that the head selects.
        x: the activations to encode.

    Raises:
        UserError: if there is no such kernel.
    """
    check_name(kernel)
    if kernel == "auto":
        fits = x.device.type == "cpu" and x.dtype in (float32, float64)
        kernel = "sparse" if fits and density < _CROSSOVER else "dense"
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
