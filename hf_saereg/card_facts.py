"""What a model card says, read from the files that training left in a checkpoint's folder.

Notable:
- every figure comes from a file: `training.json` of the trainer, `run.json` of a recipe,
  `results.json` of a comparison, `cfg.json` of the heads; what none of them holds is left out
- paths of this machine become names, and tokens never get into these files
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_saereg.layout import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    FIGURES,
    HEADS_FOLDER,
    HOOK_NAME,
    MODEL_CONFIG,
    TOKENIZER_CONFIG,
    TRAINING_RECORD,
    without_folder,
)

CHARACTERS = 256  # a larger vocabulary is one of words and their parts
RESULTS_FILE = "results.json"
FIGURE_TITLES = {
    "compound.png": "Compound CE increase against Σ L0",
    "sites.png": "CE increase against L0, site by site",
}


class SiteFacts(NamedTuple):
    """One row of the table of fidelity; None where it was not measured."""

    hook_name: str
    family: str
    d_sae: int
    l0: float | None
    fvu: float | None
    dead: float | None
    ce_increase: float | None


class FigureFacts(NamedTuple):
    """One figure, in the checkpoint's folder."""

    path: str
    title: str


@dataclass
class CardFacts:
    """All that a card says.

    Attributes:
        repo: what the snippets load.
        kind: `character`, `finetuned` or `lora`: the template.
        base_model: name on the Hub, of the latter two.
        dataset: name of the text.
        heads: `cfg.json` of each head, by hook name in stream order.
        shape: of the language model, in words.
        has_tokenizer: whether a tokenizer lies beside it.
        training: what was trained, by label.
        options: of the training, that differ from their defaults.
        evaluation: metrics of the last evaluation, by name.
        sites: fidelity of each site.
        compound: rows of `results.json` for this model.
        figures: pictures in the folder.
        cost: by label.
        version: of hf-saereg.
    """

    repo: str
    kind: str
    base_model: str | None
    dataset: str | None
    heads: dict[str, dict[str, Any]]
    shape: str
    has_tokenizer: bool
    training: dict[str, str]
    options: dict[str, Any]
    evaluation: dict[str, float]
    sites: list[SiteFacts]
    compound: list[dict[str, Any]]
    figures: list[FigureFacts]
    cost: dict[str, str]
    version: str

    @property
    def title(self) -> str:
        """The name alone."""
        return self.repo.split("/")[-1]

    @property
    def example_site(self) -> str:
        """A site in the middle of the stream."""
        return list(self.heads)[len(self.heads) // 2]

    @property
    def options_yaml(self) -> str:
        """The options, as a recipe's configuration has them."""
        return yaml.safe_dump(self.options, sort_keys=True, allow_unicode=True).strip()


def read_facts(folder: Path, repo: str) -> CardFacts:
    """What the files in a folder say of the model in it.

    Args:
        folder: of a checkpoint; a comparison's `results.json` is looked for there and one above.
        repo: what the snippets load, `user/name`.
    """
    record = _read(folder / TRAINING_RECORD)
    results = _read(folder / RESULTS_FILE) or _read(folder.absolute().parent / RESULTS_FILE)
    name = folder.absolute().name
    heads = _heads(folder)
    config = _read(folder / MODEL_CONFIG)
    adapter = _read(folder / ADAPTER_CONFIG)
    base_model = adapter.get("base_model_name_or_path") or record.get("base_model")
    kind = "lora" if adapter else "finetuned" if base_model else "character"
    evaluation = record.get("evaluation", {})
    metadata = next((cfg["metadata"] for cfg in heads.values()), {})
    dataset = record.get("dataset") or metadata.get("dataset_path")
    rows = [row for row in results.get("rows", ()) if row["model"] == name]
    return CardFacts(
        repo=repo,
        kind=kind,
        base_model=base_model,
        dataset=without_folder(dataset),
        heads=heads,
        shape=_shape(config),
        has_tokenizer=(folder / TOKENIZER_CONFIG).is_file(),
        training=_training(heads, record),
        options=record.get("options", {}),
        evaluation=evaluation,
        sites=[_site(name, cfg, rows, evaluation) for name, cfg in heads.items()],
        compound=[_compound(row) for row in results.get("compound", ()) if row["model"] == name],
        figures=[
            FigureFacts(f"{FIGURES}/{file}", title)
            for file, title in FIGURE_TITLES.items()
            if (folder / FIGURES / file).is_file()
        ],
        cost=_cost(record),
        version=_version(),
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _heads(folder: Path) -> dict[str, dict[str, Any]]:
    paths = [
        path
        for path in folder.glob(f"{HEADS_FOLDER}/*/{CONFIG_FILE}")
        if HOOK_NAME.fullmatch(path.parent.name)
    ]
    return {path.parent.name: _read(path) for path in sorted(paths, key=_stream_order)}


def _stream_order(path: Path) -> tuple[int, bool]:
    _, block, place = path.parent.name.split(".")
    return int(block), place.endswith("post")


def _shape(config: Mapping[str, Any]) -> str:
    if not config:
        return "its base model's shape"
    units = "characters, " if config["vocab_size"] <= CHARACTERS else ""
    return (
        f"{units}{config['n_layer']} layers, {config['n_head']} heads, width {config['n_embd']}, "
        f"context {config['n_positions']}"
    )


def _training(heads: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    ours = [cfg["metadata"].get("saereg", {}) for cfg in heads.values()]
    listed = {
        "SAE families": "architecture",
        "normalization": "normalization",
        "λ, weight of the reconstruction": "reconstruction_weight",
        "k": "k",
        "target L0": "target_l0",
        "sparsity coefficient": "sparsity_coefficient",
        "first positions of a row that SAEs do not read": "skip_positions",
        "token ids that SAEs do not read": "skip_tokens",
    }
    facts = {label: _distinct([head.get(name) for head in ours]) for label, name in listed.items()}
    facts = {
        "objective": "cross-entropy + the mean over sites of [λ (R + A) / N + S]" if heads else "",
        **facts,
        "text": without_folder(record.get("dataset")) or "",
        "steps": str(record.get("steps", "")),
        "tokens a step": str(record.get("tokens_per_step", "")),
        "seed": str(record.get("seed", "")),
        "validation cross-entropy": _nats(record.get("evaluation", {}).get("eval_loss")),
        "versions": ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items()),
    }
    return {label: text for label, text in facts.items() if text}


def _distinct(values: list[Any]) -> str:
    """Without those that say nothing: absent, or 0."""
    return ", ".join(dict.fromkeys(f"{value}" for value in values if value))


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f} nats a token"


def _site(
    model: str,
    cfg: Mapping[str, Any],
    rows: list[dict[str, Any]],
    evaluation: Mapping[str, float],
) -> SiteFacts:
    hook_name = cfg["metadata"]["hook_name"]
    measured = next(
        (row for row in rows if row["site"] == hook_name and row["source"] == "cotrained"), {}
    )
    family = cfg["metadata"].get("saereg", {}).get("architecture", cfg["architecture"])
    figures = {
        name: measured.get(name, evaluation.get(f"eval_{name}/{hook_name}"))
        for name in ("l0", "fvu", "dead_fraction")
    }
    return SiteFacts(
        hook_name, family, cfg["d_sae"], *figures.values(), measured.get("ce_increase")
    )


def _compound(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "source": "co-trained" if row["source"] == "cotrained" else row["source"]}


def _cost(record: Mapping[str, Any]) -> dict[str, str]:
    if not record.get("train_seconds"):
        return {}
    seconds, steps = record["train_seconds"], record["steps"]
    return {
        "training time": f"{seconds:,.0f} s for {steps:,} steps, without evaluations",
        "speed": f"{steps * record['tokens_per_step'] / seconds:,.0f} tokens a second",
        "machine": f"{record['world_size']} × {record['device']}",
    }


def _version() -> str:
    try:
        return version("hf-saereg")
    except PackageNotFoundError:  # a checkout that is on the path but not installed
        return "unknown"
