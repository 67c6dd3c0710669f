"""Fresh heads on a frozen model: a whole grid from one shared forward pass a batch.

Notable:
- the model is run once a batch; every head of every cell reads the same activations
- each site is scaled so that its mean norm is √d_in, and the scale folded back afterwards: one grid
  of coefficients and one learning rate then serve a plain and a regularized model alike
- each head minimises its own R + S + A, unscaled, as the published fresh SAEs do
- `b_dec` starts at the mean activation
- the learning rate is constant until a final cooldown, so that heads trained half as long cost one
  more short cooldown: their distance from the final ones says how far training still mattered
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_saereg.configuration import one_a_site
from hf_saereg.corpora import collate_blocks
from hf_saereg.heads import FAMILIES, HeadConfigError, SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.modeling import SAERegGPT2LMHeadModel

SCALING_BATCHES = 8


@dataclass
class FreshHeadsArguments:
    """Which fresh heads a frozen model gets, and how they are trained."""

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
    fidelity_blocks: int = field(
        default=256, metadata={"help": "Validation blocks on which fidelity is measured."}
    )

    def __post_init__(self) -> None:
        for name in ("fresh_steps", "fresh_batch_size", "fidelity_blocks"):
            if getattr(self, name) < 1:
                raise HeadConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.fresh_warmup_steps < 0:
            raise HeadConfigError(
                f"fresh_warmup_steps is {self.fresh_warmup_steps}; it must be at least 0."
            )
        if not 0 < self.fresh_cooldown <= 1:
            raise HeadConfigError(
                f"fresh_cooldown is {self.fresh_cooldown}; it must be above 0 and at most 1."
            )
        if not 0 < self.fresh_learning_rate < math.inf:
            raise HeadConfigError(
                f"fresh_learning_rate is {self.fresh_learning_rate}; it must be finite and above 0."
            )
        if not self.cells() or not self.fresh_d_sae:
            raise HeadConfigError(
                f"There is no fresh head to train: fresh_architectures is "
                f"{self.fresh_architectures}, fresh_k {self.fresh_k}, fresh_coefficient "
                f"{self.fresh_coefficient}, fresh_d_sae {self.fresh_d_sae}."
            )

    def d_sae_by_site(self, hook_names: list[str]) -> dict[str, int]:
        """Latents a fresh head, by hook name.

        Raises:
            HeadConfigError: if there is neither one value nor one a site.
        """
        sizes = one_a_site("fresh_d_sae", self.fresh_d_sae, len(hook_names))
        return dict(zip(hook_names, sizes, strict=True))

    def cooldown_start(self, length: int) -> int:
        """First step of the cooldown of a training of `length` steps."""
        return length - math.ceil(self.fresh_cooldown * length)

    def learning_rate_factor(self, step: int, length: int) -> float:
        """Share of the peak learning rate: linear warm-up, constant, linear cooldown to 0.

        Args:
            step: from 0.
            length: steps in all.
        """
        start, warmup_steps = self.cooldown_start(length), self.fresh_warmup_steps
        warmup = (step + 1) / warmup_steps if step < warmup_steps else 1.0
        cooldown = (length - step) / (length - start + 1) if step >= start else 1.0
        return min(warmup, cooldown)

    def cells(self) -> list["Cell"]:
        """The grid, in a fixed order.

        Raises:
            HeadConfigError: for an unknown family, or sizes and weights that no head can have.
        """
        grid = [
            Cell(architecture, sparsity, option)
            for architecture in self.fresh_architectures
            for option, values in [self._sparsities(architecture)]
            for sparsity in values
        ]
        for cell in grid:
            for d_sae in self.fresh_d_sae:
                cell.head("blocks.0.hook_resid_pre", 1, d_sae)
        return grid

    def _sparsities(self, architecture: str) -> tuple[str, list[float]]:
        if _sparsity_option(architecture) == "k":
            return "k", self.fresh_k
        if self.fresh_target_l0 is not None:
            return "target_l0", self.fresh_target_l0
        return "sparsity_coefficient", self.fresh_coefficient


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a family at a sparsity, on every site."""

    architecture: str
    sparsity: float
    option: str  # what `sparsity` is of a head's configuration: k, c or a target

    @property
    def name(self) -> str:
        """A file name: topk_k10, standard_c0.5, gated_l10."""
        symbol = {"k": "k", "sparsity_coefficient": "c", "target_l0": "l"}[self.option]
        return f"{self.architecture}_{symbol}{self.sparsity:g}"

    def head(self, hook_name: str, d_in: int, d_sae: int) -> SAEHeadConfig:
        """Configuration of this cell's head on one site, checked.

        Raises:
            HeadConfigError: if no head can be made like this.
        """
        whole = float(self.sparsity).is_integer()  # neither infinity nor NaN is
        sparsity = int(self.sparsity) if whole else self.sparsity
        option = {self.option: sparsity}
        config = SAEHeadConfig(self.architecture, hook_name, d_in, d_sae, **option)
        with torch.device("meta"):
            make_head(config)
        return config


Grid = dict[Cell, HeadBank]


def _sparsity_option(architecture: str) -> str:
    if architecture not in FAMILIES:
        raise HeadConfigError(
            f"Unknown architecture {architecture!r} among the fresh heads; choose from "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[architecture].sparsity_option


def train_fresh_heads(
    model: SAERegGPT2LMHeadModel,
    blocks: Dataset,
    arguments: FreshHeadsArguments,
    seed: int,
    description: str,
    on_half: Callable[[Grid], None] | None = None,
) -> Grid:
    """Train every cell of the grid on every site of a frozen model.

    Args:
        model: left as it is, but in evaluation mode.
        blocks: training text, with `input_ids`.
        arguments: grid and schedule.
        seed: of initialisation and order.
        description: of the progress bar.
        on_half: is given the heads that half as many steps, with their own cooldown, lead to.

    Returns:
        Heads that read raw activations, by cell.
    """
    torch.manual_seed(seed)
    model = model.eval()
    batches = _endless_batches(blocks, arguments.fresh_batch_size, seed)
    means, scales = _site_scaling(model, batches)
    d_sae = arguments.d_sae_by_site(model.hook_names)
    grid = {cell: _fresh_bank(cell, d_sae, means) for cell in arguments.cells()}
    optimizer = torch.optim.Adam(
        [parameter for bank in grid.values() for parameter in bank.parameters()],
        lr=arguments.fresh_learning_rate,
        fused=True,
    )
    steps, half = arguments.fresh_steps, arguments.fresh_steps // 2
    fork = arguments.cooldown_start(half)
    progress = tqdm(total=steps + half - fork, desc=description, dynamic_ncols=True)

    def train(
        grid: Grid, optimizer: torch.optim.Adam, batches: Iterator[Tensor], span: range, length: int
    ) -> None:
        for step, batch in zip(span, batches, strict=False):
            factor = arguments.learning_rate_factor(step, length)
            for group in optimizer.param_groups:
                group["lr"] = arguments.fresh_learning_rate * factor
            activations = {
                hook_name: x * scales[hook_name]
                for hook_name, x in _activations(model, batch).items()
            }
            _step(grid, optimizer, activations)
            progress.update()

    with progress:
        train(grid, optimizer, batches, range(fork), steps)
        if on_half is not None:
            upcoming = list(itertools.islice(batches, half - fork))
            batches = itertools.chain(upcoming, batches)  # both see the same text
            shorter, its_optimizer = copy.deepcopy((grid, optimizer))
            train(shorter, its_optimizer, iter(upcoming), range(fork, half), half)
            on_half(_folded(shorter, scales))
        train(grid, optimizer, batches, range(fork, steps), steps)
    return _folded(grid, scales)


def _step(grid: Grid, optimizer: torch.optim.Adam, activations: dict[str, Tensor]) -> None:
    heads = [head for bank in grid.values() for head in bank]
    every = [head.losses(activations[head.config.hook_name]) for head in heads]
    totals = [losses.reconstruction + losses.sparsity + losses.auxiliary for losses in every]
    optimizer.zero_grad()
    torch.stack(totals).sum().backward()
    optimizer.step()
    for head, losses in zip(heads, every, strict=True):
        head.observe(losses.statistics.fired, losses.statistics.tokens)


def _endless_batches(blocks: Dataset, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        blocks, batch_size, shuffle=True, generator=generator, collate_fn=collate_blocks
    )
    while True:
        for batch in loader:
            yield batch["input_ids"]  # (batch, sequence)


@torch.no_grad()
def _activations(model: SAERegGPT2LMHeadModel, input_ids: Tensor) -> dict[str, Tensor]:
    with model.reading(model.hook_names) as activations:
        model.transformer(input_ids.to(model.device), use_cache=False)
    return {hook_name: x.flatten(0, 1) for hook_name, x in activations.items()}  # (tokens, d_in)


def _site_scaling(
    model: SAERegGPT2LMHeadModel, batches: Iterator[Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Mean of the scaled activations, and the scale that brings their mean norm to √d_in."""
    seen = [_activations(model, next(batches)) for _ in range(SCALING_BATCHES)]
    means, scales = {}, {}
    for hook_name in model.hook_names:
        x = torch.cat([activations[hook_name] for activations in seen])  # (tokens, d_in)
        scales[hook_name] = (math.sqrt(x.shape[-1]) / x.norm(dim=-1).mean()).item()
        means[hook_name] = x.mean(dim=0) * scales[hook_name]
    return means, scales


def _fresh_bank(cell: Cell, d_sae: dict[str, int], means: dict[str, Tensor]) -> HeadBank:
    bank = HeadBank(
        make_head(cell.head(hook_name, len(mean), d_sae[hook_name]))
        for hook_name, mean in means.items()
    )
    for hook_name, mean in means.items():
        bank[hook_name].to(mean.device).b_dec.data.copy_(mean)
    return bank


def _folded(grid: Grid, scales: dict[str, float]) -> Grid:
    return {
        cell: HeadBank(head.folded(scales[head.config.hook_name]) for head in bank)
        for cell, bank in grid.items()
    }
