"""Two models side by side: co-trained heads, fresh heads on both, and what they cost in CE.

Notable:
- every model is scored on the same validation blocks with the same grid, steps and seed
- fresh heads are scored at half of their training too, so that a reader sees how far they still
  moved
- a finished model's scores are kept on disk, so that an interrupted comparison goes on after them
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import GPT2Config, TrainingArguments

from hf_saereg.configuration import HeadsArguments, gpt2_hook_names
from hf_saereg.corpora import CorpusArguments, collate_blocks
from hf_saereg.fidelity import Batch, baselines, fidelity, fidelity_of_each
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.folder import save_heads
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.run_folder import command_line, package_versions, write_json
from hf_saereg.scores import Fidelity
from hf_saereg.sweep import Cell, FreshHeadsArguments, train_fresh_heads

SCORES_FILE = "scores.json"
FIDELITY_BATCH_SIZE = 32
LOGITS_AT_ONCE = 2**26  # as float32, 256 MiB


def score_model(
    name: str,
    model: SAERegGPT2LMHeadModel,
    blocks: DatasetDict,
    arguments: FreshHeadsArguments,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Fit fresh heads on a frozen model and score them, and its own heads if it has some.

    Args:
        name: of the model in all tables.
        model: left as it is.
        blocks: `train` and `validation`.
        arguments: grid and schedule.
        seed: of the fresh heads.
        folder: for the fresh heads and the scores; scores found there are returned as they are.

    Returns:
        `rows`, `compound`, `baselines` and `seconds` of this model, JSON-serialisable.
    """
    if (folder / SCORES_FILE).is_file():
        return json.loads((folder / SCORES_FILE).read_text())
    model = model.eval()
    start = time.monotonic()
    batches = fidelity_batches(blocks["validation"], arguments.fidelity_blocks, model.config)
    base = baselines(model, batches)
    halves: list[dict[Cell, HeadBank]] = []
    scoring = time.monotonic() - start
    start = time.monotonic()
    grid = train_fresh_heads(
        model, blocks["train"], arguments, seed, f"Fresh SAEs on {name}", on_half=halves.append
    )
    training = time.monotonic() - start
    start = time.monotonic()
    rows, compound = [], []
    for cell, heads in tqdm(grid.items(), desc=f"Scoring them on {name}", dynamic_ncols=True):
        save_heads(heads, folder / cell.name, {"model_name": name})
        both = {"whole": heads, "half": halves[0][cell]}
        scores, halfway = fidelity_of_each(model, both, batches, base).values()
        labels = {"model": name, "family": cell.architecture, "source": "fresh"}
        labels["sparsity"] = cell.sparsity
        _append(rows, compound, labels, scores, halfway)
    if model.heads:
        scores = fidelity(model, model.heads, batches, base)
        config = model.heads.configs[0]
        labels = {"model": name, "family": config.architecture, "source": "cotrained"}
        labels["sparsity"] = config.k or config.target_l0 or config.sparsity_coefficient
        _append(rows, compound, labels, scores, None)
    scoring += time.monotonic() - start
    result = {
        "rows": rows,
        "compound": compound,
        "baselines": base._asdict(),
        "seconds": {f"fresh_{name}": training, f"fidelity_{name}": scoring},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES_FILE, result)
    return result


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
        trained: figures of each model's training, `train_seconds` among them, by name.
        blocks: `train` and `validation`.
        arguments: grid and schedule of the fresh heads.
        setup: what a reader must know of the run; `seed` is also the fresh heads'.
        folder: for the fresh heads and the scores, one folder a model.
    """
    scores = {
        name: score_model(name, model, blocks, arguments, setup["seed"], folder / name)
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
        "setup": setup,
    }


def describe_setup(
    arguments: TrainingArguments,
    heads: HeadsArguments,
    corpus: CorpusArguments,
    fresh: FreshHeadsArguments,
    config: GPT2Config,
    blocks: DatasetDict,
) -> dict[str, Any]:
    """What the page says of a run, in words; checks the sizes of the fresh heads on the way.

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
    sparsity = f"c {_listed(heads.sparsity_coefficient)}"
    if heads.k or heads.target_l0:
        sparsity = f"{'k' if heads.k else 'target L0'} {_listed(heads.k or heads.target_l0)}"
    devices = f"{arguments.world_size} × {arguments.device.type}"
    return {
        "title": f"SAE regularization on {corpus.dataset}",
        "dataset": corpus.dataset,
        "train_tokens": len(blocks["train"]) * corpus.block_size,
        "validation_tokens": len(blocks["validation"]) * corpus.block_size,
        "steps": arguments.max_steps,
        "tokens_per_step": arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        * corpus.block_size,
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.n_positions}",
        "regularizer": f"{heads.architecture} heads, d_sae {_listed(heads.d_sae)}, {sparsity}, "
        f"λ {_listed(heads.reconstruction_weight)}",
        "fresh": f"{', '.join(cell.name for cell in fresh.cells())}; "
        f"d_sae {_listed(dict.fromkeys(fresh_d_sae))}, "
        f"{fresh.fresh_steps} steps of {fresh.fresh_batch_size * corpus.block_size} tokens, "
        f"fidelity on {min(fresh.fidelity_blocks, len(blocks['validation']))} blocks",
        "seed": arguments.seed,
        "command": command_line(),
        "device": devices,
        "versions": package_versions(),
    }


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def fidelity_batches(blocks: Dataset, n_blocks: int, config: GPT2Config) -> list[Batch]:
    """The first blocks, in batches; they stay in memory, because every head is scored on them.

    Args:
        blocks: validation text, with `input_ids`.
        n_blocks: how many of them.
        config: of the language model; a large vocabulary makes batches smaller.
    """
    rows = list(blocks.select(range(min(n_blocks, len(blocks)))))
    at_once = LOGITS_AT_ONCE // (config.vocab_size * len(rows[0]["input_ids"]))
    size = max(1, min(FIDELITY_BATCH_SIZE, at_once))
    return [collate_blocks(rows[i : i + size]) for i in range(0, len(rows), size)]


def _append(
    rows: list[dict[str, Any]],
    compound: list[dict[str, Any]],
    labels: dict[str, Any],
    scores: Fidelity,
    halfway: Fidelity | None,
) -> None:
    for hook_name, (effect, statistics) in scores.sites.items():
        rows.append(
            {
                **labels,
                "site": hook_name,
                **effect.figures(),
                **statistics.figures(),
                "explained_variance": statistics.explained_variance,
                "density_histogram": statistics.density_histogram()._asdict(),
                "ce_increase_at_half": halfway and halfway.sites[hook_name].effect.ce_increase,
            }
        )
    compound.append(
        {
            **labels,
            "sum_l0": scores.compound_l0,
            **scores.compound.figures(),
            "ce_increase_at_half": halfway and halfway.compound.ce_increase,
        }
    )
