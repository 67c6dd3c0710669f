"""Fresh heads on a frozen model: a whole grid from one shared forward pass a batch.

Notable:
- the model is run once a batch; every head of every cell reads the same activations, of the tokens
  that the model's `token_mask` leaves
- each site is scaled so that its mean norm is √d_in, and the scale folded back afterwards: one grid
  and one learning rate then serve a plain and a regularized model alike
- each head minimises its own R + S + A, unscaled, as the published fresh SAEs do
- `b_dec` starts at the mean activation
- what a cell becomes does not depend on the cells beside it: its weights start from its own seed,
  and the text of a step is the same for all, so cells may be trained together, apart, or resumed
- at the step where a training half as long would begin to cool down, a copy of the heads does
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Self

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler
from tqdm.auto import tqdm

from hf_saereg.corpora import collate_blocks
from hf_saereg.errors import UserError
from hf_saereg.grid import Cell, Schedule
from hf_saereg.heads import HeadConfigError, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.stack import HeadStack
from hf_saereg.heads.tokens import tokens_read
from hf_saereg.modeling import SAERegGPT2LMHeadModel

SCALING_BATCHES = 8


class DivergedError(UserError):
    """A fresh head's weights became NaN or infinite; the message names it."""


@dataclass
class Track:
    """Heads on the way to a training of `length` steps, `step` of which are done.

    Attributes:
        stack: of the heads, where they can be trained as one.
        optimizer: of the stack's parameters, or else of the heads' own.
    """

    bank: HeadBank
    stack: HeadStack | None
    optimizer: torch.optim.Adam
    length: int
    tokens: int  # of a step
    step: int = 0

    @classmethod
    def of(cls, bank: HeadBank, length: int, tokens: int) -> Self:
        """A training that is yet to begin."""
        stack = HeadStack.of(bank) if HeadStack.can_hold(bank, tokens) else None
        parameters = (bank if stack is None else stack.wide).parameters()
        return cls(bank, stack, torch.optim.Adam(parameters, fused=True), length, tokens)

    def branch(self, length: int) -> Self:
        """A training that is the same up to here, of another length."""
        other = self.of(copy.deepcopy(self.bank), length, self.tokens)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.step = self.step
        return other

    def train(self, activations: dict[str, Tensor], learning_rate: float) -> None:
        """One step on scaled activations, (tokens, d_in) by hook name."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total, fired, tokens = self._losses(activations)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        for head, own in zip(self.bank, fired, strict=True):
            head.observe(own, tokens)
        self.step += 1

    def _losses(
        self, activations: dict[str, Tensor]
    ) -> tuple[Tensor, Sequence[Tensor] | Tensor, Tensor]:
        """Sum of all losses, counts of each head's firing latents, and tokens."""
        if self.stack is not None:
            own = [activations[hook_name] for hook_name in self.bank.hook_names]
            return self.stack.losses(torch.stack(own))
        every = [head.losses(activations[head.config.hook_name]) for head in self.bank]
        totals = [losses.reconstruction + losses.sparsity + losses.auxiliary for losses in every]
        fired = [losses.statistics.fired for losses in every]
        return torch.stack(totals).sum(), fired, every[0].statistics.tokens


@dataclass
class CellTraining:
    """One cell's heads, and from the fork on those that train half as long."""

    cell: Cell
    whole: Track
    half: Track | None = None

    def train(self, step: int, activations: dict[str, Tensor], schedule: Schedule) -> None:
        """A step of the shared pass; one that is behind or ahead of the cell leaves it alone."""
        if step != self.whole.step:
            return
        if step == schedule.fork:
            self.half = self.whole.branch(schedule.half)
        for track in (self.whole, self.half):
            if track is not None and track.step == step < track.length:
                track.train(activations, schedule.learning_rate_at(step, track.length))

    def check_finite(self) -> None:
        """Check the weights.

        Raises:
            DivergedError: if any became NaN or infinite.
        """
        for track in (self.whole, self.half):
            for head in track.bank if track is not None else ():
                if not all(parameter.isfinite().all() for parameter in head.parameters()):
                    raise DivergedError(
                        f"By step {track.step} the fresh SAE {self.cell.name} at "
                        f"{head.config.hook_name} has weights that are not finite; lower the "
                        "learning rate of fresh SAEs, and begin in another folder."
                    )


class FreshHeads(NamedTuple):
    """Heads of a finished cell, which read raw activations.

    Attributes:
        whole: trained to the end.
        half: trained half as long, with a cooldown of their own.
    """

    whole: HeadBank
    half: HeadBank


@dataclass
class SharedTraining:
    """A frozen model, its text, and what its sites are scaled by.

    Attributes:
        means: (d_in,) of the scaled activations, by hook name.
        scales: what brings the mean norm to √d_in, by hook name.
    """

    model: SAERegGPT2LMHeadModel
    blocks: Dataset
    schedule: Schedule
    seed: int
    means: dict[str, Tensor]
    scales: dict[str, float]

    @classmethod
    def of(
        cls, model: SAERegGPT2LMHeadModel, blocks: Dataset, schedule: Schedule, seed: int
    ) -> Self:
        """Measure the sites.

        Args:
            model: left as it is, but in evaluation mode.
            blocks: training text, with `input_ids`.
            schedule: of every cell.
            seed: of the order of the text.

        Raises:
            HeadConfigError: if the model skips every token.
        """
        model = model.eval()
        first = itertools.islice(_batches(blocks, schedule.batch_size, seed), SCALING_BATCHES)
        seen = [_activations(model, batch) for batch in first]
        means, scales = {}, {}
        for hook_name in model.hook_names:
            x = torch.cat([activations[hook_name] for activations in seen])  # (tokens, d_in)
            if len(x) == 0:
                raise HeadConfigError(
                    f"{model.skip.skip_in_words} leave no token to train on; skip fewer, or give "
                    "longer blocks."
                )
            scales[hook_name] = (math.sqrt(x.shape[-1]) / x.norm(dim=-1).mean()).item()
            means[hook_name] = x.mean(dim=0) * scales[hook_name]
        return cls(model, blocks, schedule, seed, means, scales)

    def start(self, cell: Cell) -> CellTraining:
        """A cell before its first step.

        Raises:
            HeadConfigError: if its heads do not fit the model.
        """
        d_in = self.model.config.n_embd
        with torch.random.fork_rng():
            torch.manual_seed(cell.seed)
            configs = cell.heads(self.model.hook_names, d_in)
            skip = asdict(self.model.skip)
            bank = HeadBank(make_head(replace(config, **skip)) for config in configs)
        for hook_name, mean in self.means.items():
            bank[hook_name].to(mean.device).b_dec.data.copy_(mean)
        tokens = self.schedule.batch_size * len(self.blocks[0]["input_ids"])
        return CellTraining(cell, Track.of(bank, self.schedule.steps, tokens))

    def run(
        self,
        trainings: Sequence[CellTraining],
        description: str,
        keep: Callable[[int], None] | None = None,
        show_progress: bool = True,
    ) -> None:
        """Train to the end; cells that are ahead wait until the others have caught up.

        Args:
            trainings: new ones, or ones that were interrupted.
            description: of the progress bar.
            keep: called after every step, with the number of steps done.
            show_progress: whether there is a progress bar.
        """
        first = min((training.whole.step for training in trainings), default=self.schedule.steps)
        span = range(first, self.schedule.steps)
        batches = _batches(
            self.blocks, self.schedule.batch_size, self.seed, SCALING_BATCHES + first
        )
        progress = tqdm(
            zip(span, batches, strict=False),
            desc=description,
            initial=first,
            total=self.schedule.steps,
            disable=not show_progress,
            dynamic_ncols=True,
        )
        for step, batch in progress:
            activations = {
                hook_name: x * self.scales[hook_name]
                for hook_name, x in _activations(self.model, batch).items()
            }
            for training in trainings:
                training.train(step, activations, self.schedule)
            if keep is not None:
                keep(step + 1)

    def finished(self, training: CellTraining) -> FreshHeads:
        """The heads of a cell that was trained to its end."""
        return FreshHeads(self._folded(training.whole.bank), self._folded(training.half.bank))

    def _folded(self, bank: HeadBank) -> HeadBank:
        return HeadBank(head.folded(self.scales[head.config.hook_name]) for head in bank)


def _batches(blocks: Dataset, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Shuffled text without end, (batch, sequence), from batch `start` on."""
    generator = torch.Generator().manual_seed(seed)
    sampler = BatchSampler(RandomSampler(blocks, generator=generator), batch_size, drop_last=False)
    epochs = itertools.chain.from_iterable(itertools.repeat(sampler))  # each shuffles anew
    for rows in itertools.islice(epochs, start, None):
        yield collate_blocks([blocks[row] for row in rows])["input_ids"]


@torch.no_grad()
def _activations(model: SAERegGPT2LMHeadModel, input_ids: Tensor) -> dict[str, Tensor]:
    """(tokens, d_in) by hook name, of the tokens that are read."""
    input_ids = input_ids.to(model.device)
    with model.reading(model.hook_names) as activations:
        model.transformer(input_ids, use_cache=False)
    mask = model.token_mask({"input_ids": input_ids})
    return {hook_name: tokens_read(x, mask) for hook_name, x in activations.items()}
