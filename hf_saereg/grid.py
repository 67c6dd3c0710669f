"""Which fresh heads a frozen model gets, and how long they train.

Notable:
- a cell is a family at a sparsity, a size and a seed, with a head on every site
- the sparsity is k, a coefficient c, or an L0 that a controller drives c to; sites are scaled to
  a mean norm of √d_in, so the same c, and the same start of the controller, serve every model
- the learning rate is constant until a final cooldown, so that heads trained half as long cost one
  more short cooldown: their distance from the final ones says how far training still mattered
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from hf_saereg.configuration import one_a_site
from hf_saereg.heads import HeadConfigError, SAEHeadConfig, family_named, make_head
from hf_saereg.heads.config import FAMILY_OPTIONS

# of a head's configuration, what a fresh one can be told beside sparsity, size and AuxK
HEAD_OPTIONS = (
    "rectified",
    "bandwidth",
    "reference_window",
    "quadratic_penalty",
    "tied",
    "unit_decoder_norm",
)
DEAD_AFTER_TOKENS = 100_000  # a tenth of a head's own default: fresh ones train for less


@dataclass(frozen=True)
class Schedule:
    """How fresh heads are trained."""

    steps: int
    batch_size: int  # blocks a step
    learning_rate: float  # of Adam before its cooldown
    cooldown: float  # share of the steps in which the rate falls to 0
    warmup_steps: int  # linear

    def check(self, **names: str) -> None:
        """Check every value.

        Args:
            **names: what the user calls a field, where it is not the field's name.

        Raises:
            HeadConfigError: naming the first that cannot be.
        """
        good = {
            "steps": (self.steps >= 1, "it must be at least 1"),
            "batch_size": (self.batch_size >= 1, "it must be at least 1"),
            "warmup_steps": (self.warmup_steps >= 0, "it must be at least 0"),
            "cooldown": (0 < self.cooldown <= 1, "it must be above 0 and at most 1"),
            "learning_rate": (
                0 < self.learning_rate < math.inf,
                "it must be finite and above 0",
            ),
        }
        for name, (is_good, expected) in good.items():
            if not is_good:
                shown = names.get(name, name)
                raise HeadConfigError(f"{shown} is {getattr(self, name)}; {expected}.")

    def told(self, block_size: int) -> dict[str, float]:
        """What every `results.json` says of it in `setup`, whatever else was trained there.

        Args:
            block_size: tokens a block.
        """
        own = {f"fresh_{name}": value for name, value in asdict(self).items()}
        return own | {"fresh_tokens_per_step": self.batch_size * block_size}

    @property
    def half(self) -> int:
        """Steps of the training that is half as long."""
        return self.steps // 2

    @property
    def fork(self) -> int:
        """Step at which the shorter training leaves the longer one, for its own cooldown."""
        return self.cooldown_start(self.half)

    def cooldown_start(self, length: int) -> int:
        """First step of the cooldown of a training of `length` steps."""
        return length - math.ceil(self.cooldown * length)

    def learning_rate_at(self, step: int, length: int) -> float:
        """Linear warm-up, constant, linear cooldown to 0.

        Args:
            step: from 0.
            length: steps in all.
        """
        start = self.cooldown_start(length)
        warmup = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        cooldown = (length - step) / (length - start + 1) if step >= start else 1.0
        return self.learning_rate * min(warmup, cooldown)


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a family at a sparsity, a size and a seed, on every site."""

    architecture: str
    sparsity: float
    option: str  # what `sparsity` is of a head's configuration: k, c or a target
    d_sae: tuple[int, ...]  # one for all sites, or one a site
    seed: int  # of the initial weights
    auxk: int = 0  # dead latents that fit the error, where the family has AuxK
    dead_after_tokens: int | None = None  # for AuxK; DEAD_AFTER_TOKENS by default
    head_options: tuple[tuple[str, Any], ...] = ()  # `HEAD_OPTIONS`, where the family has them

    @property
    def name(self) -> str:
        """A file name: topk_k10_d512_s0, standard_c0.5_d512_s0, gated_l10_d512_s0."""
        symbol = {"k": "k", "sparsity_coefficient": "c", "target_l0": "l"}[self.option]
        sizes = "-".join(map(str, self.d_sae))
        return f"{self.architecture}_{symbol}{self.sparsity:g}_d{sizes}_s{self.seed}"

    def heads(self, hook_names: Sequence[str], d_in: int) -> list[SAEHeadConfig]:
        """Configurations of this cell's heads, one a site.

        Raises:
            HeadConfigError: if no head can be made like this.
        """
        sizes = one_a_site("d_sae", list(self.d_sae), len(hook_names))
        return [
            self._head(hook_name, d_in, d_sae)
            for hook_name, d_sae in zip(hook_names, sizes, strict=True)
        ]

    def check(self) -> None:
        """Check what can be without a model.

        Raises:
            HeadConfigError: if no head can be made like this.
        """
        for d_sae in self.d_sae:
            self._head("any site", 1, d_sae)

    def _head(self, hook_name: str, d_in: int, d_sae: int) -> SAEHeadConfig:
        whole = float(self.sparsity).is_integer()  # neither infinity nor NaN is
        options = {self.option: int(self.sparsity) if whole else self.sparsity}
        family = family_named(self.architecture)
        if self.option == "target_l0":
            options["sparsity_coefficient"] = family.first_coefficient
        if self.auxk and "auxk" in family.own_options:
            dead_after = self.dead_after_tokens
            dead_after = DEAD_AFTER_TOKENS if dead_after is None else dead_after
            options |= {"auxk": self.auxk, "dead_after_tokens": dead_after}
        options |= {
            name: value
            for name, value in self.head_options
            if name not in FAMILY_OPTIONS or name in family.own_options
        }
        if self.option == "k" and not whole:
            raise HeadConfigError(
                f"A {self.architecture} head cannot keep {self.sparsity} latents a token; its "
                "sparsity is a whole number."
            )
        config = SAEHeadConfig(self.architecture, hook_name, d_in, d_sae, **options)
        with torch.device("meta"):
            make_head(config).saelens_options()  # or it would be trained and could not be saved
        return config


def check_auxk(architectures: Sequence[str], **options: int | None) -> None:
    """Check that options of AuxK have an effect in a grid.

    Args:
        architectures: families of the grid.
        **options: AuxK's latents, then the tokens after which one is dead, by the user's names.

    Raises:
        HeadConfigError: naming the option that has none.
    """
    (auxk_name, auxk), (dead_name, dead_after) = options.items()
    if auxk and not any("auxk" in family_named(name).own_options for name in architectures):
        raise HeadConfigError(
            f"{auxk_name} is {auxk}, but none of the families {', '.join(architectures)} has AuxK; "
            "add topk or batchtopk, or leave it out."
        )
    if dead_after is not None and not auxk:
        raise HeadConfigError(
            f"{dead_name} is {dead_after}, but {auxk_name} is 0, so nothing depends on it; set "
            f"{auxk_name} or leave it out."
        )


def read_head_options(
    text: str | None, architectures: Sequence[str], name: str
) -> tuple[tuple[str, Any], ...]:
    """Options of fresh heads beside their sparsity and size, as `Cell.head_options`.

    Args:
        text: a JSON object; None for none.
        architectures: families of the grid.
        name: what the user calls it.

    Raises:
        HeadConfigError: if it is no object, or has an option that none of the families has.
    """
    try:
        found = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise HeadConfigError(f"{name} is {text!r}, which is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise HeadConfigError(f'{name} is {text!r}; give options by name, as in {{"tied": true}}.')
    families = [family_named(architecture) for architecture in architectures]
    own = {option for family in families for option in family.own_options}
    usable = [option for option in HEAD_OPTIONS if option not in FAMILY_OPTIONS or option in own]
    if unknown := [option for option in found if option not in usable]:
        raise HeadConfigError(
            f"{name} has {unknown[0]!r}, which none of {', '.join(architectures)} has as a fresh "
            f"head; they have {', '.join(usable)}."
        )
    return tuple(found.items())


@dataclass(frozen=True)
class Sweep:
    """Everything that is asked of one model."""

    cells: tuple[Cell, ...]
    schedule: Schedule
    seed: int  # of the order of the text, the same for all cells
    fidelity_blocks: int  # validation blocks on which heads are scored
    save_steps: int = 200  # steps after which unfinished heads are kept
    cells_at_once: int | None = None  # that share a forward pass; all by default

    def groups(self, cells: Sequence[Cell]) -> list[Sequence[Cell]]:
        """Cells that are trained together, one group after the other."""
        size = self.cells_at_once or max(len(cells), 1)
        return [cells[first : first + size] for first in range(0, len(cells), size)]


@dataclass
class FreshHeadsArguments:
    """Options of a recipe: which fresh heads a frozen model gets, and how they are trained."""

    fresh_architectures: list[str] = field(
        default_factory=lambda: ["topk", "standard"],
        metadata={"help": "Families of the fresh heads."},
    )
    fresh_k: list[int] = field(
        default_factory=lambda: [5, 10, 20, 40],
        metadata={"help": "One topk or batchtopk head a value."},
    )
    fresh_coefficient: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0],
        metadata={"help": "One standard, gated or jumprelu head a value of c, at mean norm √d_in."},
    )
    fresh_target_l0: list[float] | None = field(
        default=None, metadata={"help": "One such head a target L0 instead, c steered towards it."}
    )
    fresh_d_sae: list[int] = field(
        default_factory=lambda: [512],
        metadata={"help": "Latents a fresh head: one value for all sites or one a site."},
    )
    fresh_steps: int = field(default=2000, metadata={"help": "Training steps of the fresh heads."})
    fresh_batch_size: int = field(default=4, metadata={"help": "Blocks a step."})
    fresh_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of Adam before its cooldown."}
    )
    fresh_cooldown: float = field(
        default=0.5, metadata={"help": "Share of the steps in which the rate falls to 0."}
    )
    fresh_warmup_steps: int = field(default=50, metadata={"help": "Linear warm-up steps."})
    fresh_auxk: int = field(
        default=0,
        metadata={"help": "Dead latents of topk and batchtopk heads that fit the error; 0 is off."},
    )
    fresh_dead_after_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens without firing after which fresh_auxk counts a latent as dead."},
    )
    fresh_head_options: str | None = field(
        default=None,
        metadata={"help": f"Other options of the heads that have them: {', '.join(HEAD_OPTIONS)}."},
    )
    fidelity_blocks: int = field(
        default=256, metadata={"help": "Validation blocks on which fidelity is measured."}
    )

    def __post_init__(self) -> None:
        self.schedule.check(**{option.name: f"fresh_{option.name}" for option in fields(Schedule)})
        if self.fidelity_blocks < 1:
            raise HeadConfigError(
                f"fidelity_blocks is {self.fidelity_blocks}; it must be at least 1."
            )
        if not self.cells(seed=0) or not self.fresh_d_sae:
            raise HeadConfigError(
                f"There is no fresh head to train: fresh_architectures is "
                f"{self.fresh_architectures}, fresh_k {self.fresh_k}, fresh_coefficient "
                f"{self.fresh_coefficient}, fresh_d_sae {self.fresh_d_sae}."
            )

    @property
    def schedule(self) -> Schedule:
        """How they are trained."""
        return Schedule(**{o.name: getattr(self, f"fresh_{o.name}") for o in fields(Schedule)})

    def sweep(self, seed: int) -> Sweep:
        """All of it at one seed, which is the text's too."""
        return Sweep(tuple(self.cells(seed)), self.schedule, seed, self.fidelity_blocks)

    def d_sae_by_site(self, hook_names: list[str]) -> dict[str, int]:
        """Latents a fresh head, by hook name.

        Raises:
            HeadConfigError: if there is neither one value nor one a site.
        """
        sizes = one_a_site("fresh_d_sae", self.fresh_d_sae, len(hook_names))
        return dict(zip(hook_names, sizes, strict=True))

    def cells(self, seed: int) -> list[Cell]:
        """The grid at one seed, in a fixed order.

        Raises:
            HeadConfigError: for an unknown family, or sizes and weights that no head can have.
        """
        head_options = read_head_options(
            self.fresh_head_options, self.fresh_architectures, "fresh_head_options"
        )
        cells = [
            Cell(
                architecture,
                sparsity,
                option,
                tuple(self.fresh_d_sae),
                seed,
                self.fresh_auxk,
                self.fresh_dead_after_tokens,
                head_options,
            )
            for architecture in self.fresh_architectures
            for option, values in [self._sparsities(architecture)]
            for sparsity in values
        ]
        for cell in cells:
            cell.check()
        check_auxk(
            self.fresh_architectures,
            fresh_auxk=self.fresh_auxk,
            fresh_dead_after_tokens=self.fresh_dead_after_tokens,
        )
        return cells

    def _sparsities(self, architecture: str) -> tuple[str, Sequence[float]]:
        if family_named(architecture).sparsity_option == "k":
            return "k", self.fresh_k
        if self.fresh_target_l0 is not None:
            return "target_l0", self.fresh_target_l0
        return "sparsity_coefficient", self.fresh_coefficient
