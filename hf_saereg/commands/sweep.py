"""`saereg sweep`: fresh SAEs on every site of a frozen GPT-2, scored.

    saereg sweep MODEL --dataset TEXT --families topk standard --target_l0 5 10 20 50 \\
        --d_sae 512 --max_steps 2000 --output_dir DIR

Writes `DIR/results.json`, the heads below `DIR/saes/`, and what `hf_saereg/fresh.py` names.

Notable:
- called again, it goes on: finished cells are never run again, unfinished ones continue where they
  were last kept; families, sparsities, sizes and seeds may be added, all else must be the same
- a target L0 is k for the families that have k, and is steered towards for the others
- several processes share the cells
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import DatasetDict

from hf_saereg.commands.text import TextArguments
from hf_saereg.fresh import score_model
from hf_saereg.grid import HEAD_OPTIONS, Cell, Schedule, Sweep, check_auxk, read_head_options
from hf_saereg.heads import HeadConfigError, SkipOptions, family_named
from hf_saereg.loading import fingerprint, load_checkpoint
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.options import as_record, parse_options
from hf_saereg.processes import start_accelerator
from hf_saereg.run_folder import (
    check_run_folder,
    command_line,
    package_versions,
    write_json,
    write_record,
)

# what may differ between a sweep and its continuation
GROWING = ("families", "target_l0", "d_sae", "seeds")
MACHINE = ("model", "tokenizer", "output_dir", "use_cpu", "save_steps", "cells_at_once")


@dataclass
class SweepArguments:
    """Options of the sweep itself; those of the text are `TextArguments`."""

    model: str = field(metadata={"help": "Folder or Hub repository of a GPT-2."})
    families: list[str] = field(
        default_factory=lambda: ["topk", "standard"],
        metadata={"help": "Of standard, gated, jumprelu, topk and batchtopk."},
    )
    target_l0: list[float] = field(
        default_factory=lambda: [5, 10, 20, 50],
        metadata={"help": "Active latents a token: k, or what the coefficient is steered to."},
    )
    d_sae: list[int] = field(
        default_factory=lambda: [512], metadata={"help": "Latents a head, one set a value."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of the initial weights, one set a value."}
    )
    max_steps: int = field(default=2000, metadata={"help": "Training steps."})
    batch_size: int = field(default=16, metadata={"help": "Blocks a step."})
    learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of Adam before its cooldown."}
    )
    cooldown: float = field(
        default=0.5, metadata={"help": "Share of the steps in which the rate falls to 0."}
    )
    warmup_steps: int = field(default=50, metadata={"help": "Linear warm-up steps."})
    auxk: int = field(
        default=0,
        metadata={"help": "Dead latents of topk and batchtopk heads that fit the error; 0 is off."},
    )
    dead_after_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens without firing after which auxk counts a latent as dead."},
    )
    head_options: str | None = field(
        default=None,
        metadata={
            "help": f"Other options of the heads that have them: {', '.join(HEAD_OPTIONS)}, as in "
            '{"tied": true}.'
        },
    )
    text_seed: int = field(default=0, metadata={"help": "Of the order of the text."})
    fidelity_blocks: int = field(
        default=256, metadata={"help": "Validation blocks on which heads are scored."}
    )
    save_steps: int = field(
        default=200, metadata={"help": "Steps after which unfinished heads are kept."}
    )
    cells_at_once: int | None = field(
        default=None,
        metadata={"help": "Cells that share a forward pass; all by default, fewer save memory."},
    )
    model_name: str | None = field(
        default=None, metadata={"help": "The model's name in tables; its folder's by default."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub repository of another tokenizer, or `characters`."},
    )
    output_dir: str = field(default="runs/sweep", metadata={"help": "Folder of the sweep."})
    use_cpu: bool = field(default=False, metadata={"help": "Even where there is a GPU."})

    def __post_init__(self) -> None:
        self.schedule.check(steps="max_steps")
        for name in ("fidelity_blocks", "save_steps", "cells_at_once"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise HeadConfigError(f"{name} is {number}; it must be at least 1.")
        for name in GROWING:
            if not getattr(self, name):
                raise HeadConfigError(f"{name} is empty; there is no head to train.")
        self.cells()

    @property
    def name(self) -> str:
        """The model's, in tables."""
        return self.model_name or Path(self.model).expanduser().resolve().name

    @property
    def schedule(self) -> Schedule:
        """How every cell is trained."""
        own = (self.max_steps, self.batch_size, self.learning_rate, self.cooldown)
        return Schedule(*own, self.warmup_steps)

    def cells(self) -> list[Cell]:
        """The grid, checked as far as it can be without a model.

        Raises:
            HeadConfigError: for a family that there is not, or sizes that no head can have.
        """
        head_options = read_head_options(self.head_options, self.families, "head_options")
        cells = {
            Cell(
                family,
                _whole(target),
                _option(family),
                (d_sae,),
                seed,
                self.auxk,
                self.dead_after_tokens,
                head_options,
            ): None
            for seed in self.seeds
            for d_sae in self.d_sae
            for family in self.families
            for target in self.target_l0
        }
        for cell in cells:
            cell.check()
        check_auxk(self.families, auxk=self.auxk, dead_after_tokens=self.dead_after_tokens)
        return list(cells)

    def sweep(self) -> Sweep:
        """What is asked of the model."""
        own = (self.text_seed, self.fidelity_blocks, self.save_steps, self.cells_at_once)
        return Sweep(tuple(self.cells()), self.schedule, *own)


def main(words: Sequence[str]) -> None:
    """Run the sweep that the options describe, or what is left of it.

    Raises:
        UserError: if it cannot be run, before anything is trained.
    """
    arguments, text, skip = parse_options(
        SweepArguments, TextArguments, SkipOptions, arguments=words
    )
    accelerator = start_accelerator(arguments.use_cpu)
    model, tokenizer = load_checkpoint(arguments.model, arguments.tokenizer)
    model.skip_over(skip.for_trained(model.skip, arguments.model))
    for cell in arguments.cells():
        cell.heads(model.hook_names, model.config.n_embd)
    folder = Path(arguments.output_dir)
    with accelerator.main_process_first():
        blocks = text.blocks(model.config, tokenizer)
        options = comparable_options(arguments, text, model, blocks)
        check_run_folder(folder, options, resume=True)
        if accelerator.is_main_process:
            write_record(
                folder, options, arguments.text_seed, accelerator.num_processes, accelerator.device
            )
    model = model.to(accelerator.device)
    scores = score_model(arguments.name, model, blocks, arguments.sweep(), folder, accelerator)
    if accelerator.is_main_process:
        setup = describe(arguments, text, model, blocks, accelerator)
        results = as_results(arguments, model, scores, setup)
        write_json(folder / "results.json", results)
        print(summary(results))
        print(f"Wrote {folder / 'results.json'}; show it with: saereg report {folder}")


def comparable_options(
    arguments: SweepArguments,
    text: TextArguments,
    model: SAERegGPT2LMHeadModel,
    blocks: DatasetDict,
) -> dict[str, Any]:
    """What must be the same whenever a sweep is gone on with, JSON-serialisable.

    Args:
        arguments: of the sweep.
        text: that was read; where it lay does not matter, but what it says does.
        model: weights and heads, and what it skips.
        blocks: `train` and `validation`.
    """
    own = as_record([arguments]) | {"model_name": arguments.name}
    return {
        **{name: value for name, value in own.items() if name not in (*GROWING, *MACHINE)},
        "block_size": text.for_model(model.config).block_size,
        "train_fraction": text.train_fraction,
        **dataclasses.asdict(model.skip),
        "model_sha256": fingerprint(model),
        "text_sha256": {split: _text_fingerprint(blocks, split) for split in blocks},
    }


def _text_fingerprint(blocks: DatasetDict, split: str) -> str:
    tokens = blocks[split].with_format("numpy")[:]["input_ids"]
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int32).tobytes()).hexdigest()


def describe(
    arguments: SweepArguments,
    text: TextArguments,
    model: SAERegGPT2LMHeadModel,
    blocks: DatasetDict,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What a reader must know of a sweep, in words and numbers."""
    block_size, config = text.for_model(model.config).block_size, model.config
    return {
        "title": f"Fresh SAEs on {arguments.name}",
        "dataset": text.dataset,
        "train_tokens": len(blocks["train"]) * block_size,
        "validation_tokens": len(blocks["validation"]) * block_size,
        "scored_tokens": min(arguments.fidelity_blocks, len(blocks["validation"])) * block_size,
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.n_positions}, vocabulary {config.vocab_size}",
        "source": arguments.model,
        **arguments.schedule.told(block_size),
        "text_seed": arguments.text_seed,
        **dataclasses.asdict(model.skip),
        "command": command_line(),
        "device": f"{accelerator.num_processes} × {accelerator.device.type}",
        "versions": package_versions(),
    }


def as_results(
    arguments: SweepArguments,
    model: SAERegGPT2LMHeadModel,
    scores: dict[str, Any],
    setup: dict[str, Any],
) -> dict[str, Any]:
    """`results.json` of one model, with the keys of a comparison's.

    Of validation CE it knows none: `baselines` has `clean_ce`, on the blocks that heads are scored
    on, which versions before called `eval_ce` of `models` too.
    """
    name, base = arguments.name, scores["baselines"]
    parameters = sum(parameter.numel() for parameter in model.plain_view().parameters())
    return {
        "models": {name: {"parameters": parameters}},
        "sites": model.hook_names,
        "rows": scores["rows"],
        "compound": scores["compound"],
        "baselines": {name: base},
        "seconds": scores["seconds"],
        "setup": setup,
    }


def summary(results: dict[str, Any]) -> str:
    """A line a cell: what all its heads together cost."""
    head = f"{'family':<10} {'source':<9} {'d_sae':>6} {'seed':>4} {'sparsity':>8}"
    lines = [f"{head} {'sum L0':>8} {'CE incr.':>9} {'recovered':>9} {'KL':>8}"]
    for row in results["compound"]:
        recovered = row["ce_recovered"]
        seed = "" if row["seed"] is None else row["seed"]
        lines.append(
            f"{row['family']:<10} {row['source']:<9} {row['d_sae']:>6} {seed:>4} "
            f"{row['sparsity']:>8g} {row['sum_l0']:>8.1f} {row['ce_increase']:>9.4f} "
            f"{'' if recovered is None else f'{recovered:.3f}':>9} {row['kl']:>8.4f}"
        )
    return "\n".join(lines)


def _option(family: str) -> str:
    return "k" if family_named(family).sparsity_option == "k" else "target_l0"


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number
