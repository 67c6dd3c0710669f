"""Shape, place, sparsity and upkeep of one sparse autoencoder, checked.

Notable:
- an option that a family does not have is an error, not ignored
- `normalization` says in which form the head reads its site, and what its error is divided by in
  the regularization term: see `hf_saereg.regularizer`
"""

import math
from dataclasses import dataclass, fields

from hf_saereg.errors import UserError

NORMALIZATIONS = ("published", "detached", "layer_norm", "variance")
FAMILY_OPTIONS = (
    "rectified",
    "bandwidth",
    "reference_window",
    "quadratic_penalty",
    "target_l0",
    "tied",
    "auxk",
)


class HeadConfigError(UserError):
    """A head was described in a way that cannot work; the message says how to fix it."""


@dataclass
class SAEHeadConfig:
    """One sparse autoencoder."""

    architecture: str  # a name in the registry of hf_saereg.heads
    hook_name: str  # where it sits, as TransformerLens names it, e.g. blocks.0.hook_resid_pre
    d_in: int  # width of the residual stream
    d_sae: int  # number of latents
    sparsity_coefficient: float = 0.0  # c, weight of the sparsity loss; its start with target_l0
    k: int | None = None  # latents kept per token (TopK, BatchTopK)
    rectified: bool = True  # ReLU on the selected values (TopK); without it SAELens has no form
    bandwidth: float = 0.1  # ε, width of the straight-through window (JumpReLU)
    reference_window: bool = False  # the published code's window instead of the paper's (JumpReLU)
    quadratic_penalty: bool = False  # S = c (L0 / target_l0 − 1)² instead of c L0 (JumpReLU)
    target_l0: float | None = None  # what a controller drives the coefficient towards
    tied: bool = False  # W_enc is W_decᵀ (standard, gated)
    auxk: int = 0  # dead latents that fit the error of the living ones (TopK, BatchTopK)
    auxk_coefficient: float = 1 / 32  # weight of their loss, as in arXiv 2406.04093
    dead_after_tokens: int = 1_000_000  # a latent is dead that has not fired on as many
    unit_decoder_norm: bool = False  # rows of W_dec have norm 1
    normalization: str = "published"  # how the head reads its site, and how its error is scaled
    reconstruction_weight: float = 1.0  # λ, weight of R + A in the regularization term

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "dead_after_tokens"):
            self._check(name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("sparsity_coefficient", "reconstruction_weight", "auxk_coefficient"):
            weight = getattr(self, name)
            good = math.isfinite(weight) and weight >= 0
            self._check(name, good, "it must be a finite number ≥ 0")
        good = self.target_l0 is None or 0 < self.target_l0 < self.d_sae
        self._check("target_l0", good, f"it must be above 0 and below d_sae ({self.d_sae})")
        good = 0 <= self.auxk <= self.d_sae
        self._check("auxk", good, f"it must be from 0 to d_sae ({self.d_sae})")
        self._check("bandwidth", self.bandwidth > 0, "it must be above 0")
        good = self.normalization in NORMALIZATIONS
        self._check("normalization", good, f"choose one of {', '.join(NORMALIZATIONS)}")
        if self.normalization == "layer_norm":
            self._check("d_in", self.d_in > 1, "layer_norm needs at least 2")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise HeadConfigError(
                f"{name} at {self.hook_name} is {getattr(self, name)}; {expected}."
            )

    def check_family(self, own_options: tuple[str, ...]) -> None:
        """Check that no option of another family was set.

        Args:
            own_options: those of `FAMILY_OPTIONS` that this head's family has.

        Raises:
            HeadConfigError: naming the first that was.
        """
        for field in fields(self):
            foreign = field.name in FAMILY_OPTIONS and field.name not in own_options
            if foreign and getattr(self, field.name) != field.default:
                raise HeadConfigError(
                    f"{field.name} at {self.hook_name} is {getattr(self, field.name)}, but "
                    f"{self.architecture} heads have no such option; leave it out."
                )
