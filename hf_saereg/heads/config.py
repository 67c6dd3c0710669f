"""Shape, place, sparsity and upkeep of one sparse autoencoder, checked.

Notable:
- an option that a family does not have is an error, not ignored
- `skip_positions` and `skip_tokens` are those of all heads of a model: see `hf_saereg.heads.tokens`
- `normalization` says in which form the head reads its site, and what its error is divided by in
  the regularization term: see `hf_saereg.regularizer`
"""

import math
from dataclasses import dataclass, field, fields

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


@dataclass(kw_only=True)
class SkipOptions:
    """Which real tokens heads neither read nor replace; none by default.

    Their activations can be far larger than all others, as those of GPT-2's first position are.
    """

    skip_positions: int = field(
        default=0, metadata={"help": "First tokens of a row that heads leave out; padding is none."}
    )
    skip_tokens: list[int] = field(
        default_factory=list,
        metadata={"help": "Token ids that heads leave out, e.g. that of the end of a text."},
    )

    def __post_init__(self) -> None:
        if self.skip_positions < 0:
            raise HeadConfigError(
                f"skip_positions is {self.skip_positions}; it must be at least 0."
            )
        if self.skip_tokens and min(self.skip_tokens) < 0:
            raise HeadConfigError(
                f"skip_tokens has {min(self.skip_tokens)}; token ids are at least 0."
            )
        self.skip_tokens = sorted(set(self.skip_tokens))

    @property
    def skip_in_words(self) -> str:
        """For a message."""
        return f"skip_positions {self.skip_positions} and skip_tokens {self.skip_tokens}"

    @property
    def skip(self) -> "SkipOptions":
        """These options alone."""
        return SkipOptions(skip_positions=self.skip_positions, skip_tokens=self.skip_tokens)

    def for_trained(self, trained: "SkipOptions", source: object) -> "SkipOptions":
        """What is left out where heads were trained already.

        Args:
            trained: what was left out then; where that is nothing, anything may be now.
            source: of the heads, for the message.

        Raises:
            HeadConfigError: if these options leave out something, but not the same.
        """
        nothing = SkipOptions()
        if self.skip != nothing and trained.skip not in (nothing, self.skip):
            raise HeadConfigError(
                f"{source} has heads that were trained with {trained.skip_in_words}, the options "
                f"say {self.skip_in_words}; leave these out."
            )
        return trained.skip if self.skip == nothing else self.skip

    def check_vocabulary(self, size: int) -> None:
        """Check that there are such tokens.

        Raises:
            HeadConfigError: if there are not.
        """
        if self.skip_tokens and max(self.skip_tokens) >= size:
            raise HeadConfigError(
                f"skip_tokens has {max(self.skip_tokens)}, but the model's {size} tokens end at "
                f"{size - 1}."
            )


@dataclass
class SAEHeadConfig(SkipOptions):
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

    @property
    def sparsity(self) -> float:
        """What makes it sparse: k, or else the L0 it is steered to, or else c."""
        return self.k or self.target_l0 or self.sparsity_coefficient

    def __post_init__(self) -> None:
        super().__post_init__()
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
        for option in fields(self):
            foreign = option.name in FAMILY_OPTIONS and option.name not in own_options
            if foreign and getattr(self, option.name) != option.default:
                raise HeadConfigError(
                    f"{option.name} at {self.hook_name} is {getattr(self, option.name)}, but "
                    f"{self.architecture} heads have no such option; leave it out."
                )
