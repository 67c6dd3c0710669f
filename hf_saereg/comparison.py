"""Two models side by side: co-trained heads, fresh heads on both, and what they cost in CE.

Notable:
- every model is scored on the same validation blocks with the same grid, steps and seed
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import GPT2Config, TrainingArguments

from hf_saereg.configuration import HeadsArguments, gpt2_hook_names
from hf_saereg.corpora import CorpusArguments
from hf_saereg.fresh import score_model
from hf_saereg.grid import FreshHeadsArguments
from hf_saereg.heads import SkipOptions
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.run_folder import command_line, package_versions


def compare_models(
    models: dict[str, SAERegGPT2LMHeadModel],
    trained: dict[str, dict[str, Any]],
    blocks: DatasetDict,
    arguments: FreshHeadsArguments,
    setup: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Score every model alike; all scores as one `results.json`.

    Args:
        models: by name.
        trained: figures of each model's training, `train_seconds` and `steps` among them, by name;
            all models were trained for as many steps.
        blocks: `train` and `validation`.
        arguments: grid and schedule of the fresh heads.
        setup: what a reader must know of the run; `seed` is also the fresh heads'.
        folder: for the fresh heads and the scores, one folder a model.
    """
    scores = {
        name: score_model(name, model, blocks, arguments.sweep(setup["seed"]), folder / name)
        for name, model in models.items()
    }
    seconds = {f"train_{name}": figures["train_seconds"] for name, figures in trained.items()}
    for score in scores.values():
        seconds |= score["seconds"]
    return {
        "models": trained,
        "sites": next(iter(models.values())).hook_names,
        "rows": [row for score in scores.values() for row in score["rows"]],
        "compound": [row for score in scores.values() for row in score["compound"]],
        "baselines": {name: score["baselines"] for name, score in scores.items()},
        "seconds": seconds,
        "setup": setup | {"steps": next(iter(trained.values()))["steps"]},
    }


def describe_setup(
    arguments: TrainingArguments,
    heads: HeadsArguments,
    corpus: CorpusArguments,
    fresh: FreshHeadsArguments,
    config: GPT2Config,
    blocks: DatasetDict,
) -> dict[str, Any]:
    """What the page says of a run, in words, but for the steps, which may follow from the epochs.

    Checks the sizes of the fresh heads on the way.

    Args:
        arguments: of the training.
        heads: of the regularized model.
        corpus: the text.
        fresh: heads fitted afterwards.
        config: of the language model.
        blocks: `train` and `validation`.

    Raises:
        HeadConfigError: if the fresh heads' sizes do not fit the sites.
    """
    fresh_d_sae = fresh.d_sae_by_site(gpt2_hook_names(config.n_layer)).values()
    devices = f"{arguments.world_size} × {arguments.device.type}"
    return {
        "title": f"SAE regularization on {corpus.dataset}",
        "dataset": corpus.dataset,
        "train_tokens": len(blocks["train"]) * corpus.block_size,
        "validation_tokens": len(blocks["validation"]) * corpus.block_size,
        "tokens_per_step": arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        * corpus.block_size,
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.n_positions}",
        "regularizer": f"{heads.architecture} heads, d_sae {_listed(heads.d_sae)}, "
        f"{_sparsity(heads)}, λ {_listed(heads.reconstruction_weight)}{_skipped(heads)}",
        "fresh": f"{', '.join(cell.name for cell in fresh.cells(arguments.seed))}; "
        f"d_sae {_listed(dict.fromkeys(fresh_d_sae))}, "
        f"{fresh.fresh_steps} steps of {fresh.fresh_batch_size * corpus.block_size} tokens, "
        f"fidelity on {min(fresh.fidelity_blocks, len(blocks['validation']))} blocks",
        **fresh.schedule.told(corpus.block_size),
        "scored_tokens": min(fresh.fidelity_blocks, len(blocks["validation"])) * corpus.block_size,
        "text_seed": arguments.seed,
        **dataclasses.asdict(heads.skip),
        "seed": arguments.seed,
        "command": command_line(),
        "device": devices,
        "versions": package_versions(),
    }


def _sparsity(heads: HeadsArguments) -> str:
    values = heads.sparsity()
    names = {"k": "k", "target_l0": "target L0", "sparsity_coefficient": "c"}
    option = next(option for option in names if values[option][0] is not None)
    return f"{names[option]} {_listed(values[option])}"


def _skipped(heads: HeadsArguments) -> str:
    return "" if heads.skip == SkipOptions() else f", {heads.skip_in_words}"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
