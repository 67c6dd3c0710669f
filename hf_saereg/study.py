"""Variants of one job, several seeds each, side by side: what each costs in CE and what it buys.

Notable:
- a study is a YAML file: `base` (the configuration of a recipe), `seeds`, and `variants`, each a
  mapping of options over the base; `model: plain` trains the twin without heads
- a cell is one variant at one seed, in a folder of its own; finished cells are never run again, and
  several processes may share a study: each takes the cells of its shard
- variants are compared with the first one, paired by seed
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from hf_saereg.character import CharacterJob
from hf_saereg.comparison import score_model
from hf_saereg.errors import UserError
from hf_saereg.fidelity import effective_rank
from hf_saereg.options import as_words
from hf_saereg.run_folder import write_json

CELL_FILE = "cell.json"


class StudyError(UserError):
    """A study's file cannot be used; the message says why."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        base: configuration file of the job.
        seeds: of every variant.
        variants: options over the base, by name; the first is what the others are compared with.
    """

    base: Path
    seeds: list[int]
    variants: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a study's file; `base` is relative to it.

        Raises:
            StudyError: if it is missing, or lacks one of the three keys.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise StudyError(f"Cannot read the study {path}: {error}.") from error
        if not isinstance(content, dict) or set(content) != {"base", "seeds", "variants"}:
            raise StudyError(f"{path} must have the keys base, seeds and variants, and no others.")
        if not content["variants"] or not content["seeds"]:
            raise StudyError(f"{path} has no variants or no seeds; there is nothing to run.")
        variants = {name: options or {} for name, options in content["variants"].items()}
        return cls(path.parent / content["base"], content["seeds"], variants)

    def cells(self) -> list[tuple[str, int]]:
        """Variant and seed of every cell, one seed after the other."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


def run_cell(study: Study, variant: str, seed: int, folder: Path) -> None:
    """Train and score one variant at one seed, unless that was done before.

    Args:
        study: what it is a cell of.
        variant: its name.
        seed: of model, text order and fresh heads.
        folder: of the study.
    """
    own = cell_folder(folder, variant, seed)
    if (own / CELL_FILE).is_file():
        return
    options = dict(study.variants[variant])
    name = options.pop("model", "regularized")
    words = ["--config", str(study.base), *as_words(options)]
    words += ["--seed", str(seed), "--output_dir", str(own), "--resume_from_checkpoint", "true"]
    job = CharacterJob.from_options(words)
    model, figures = job.train(name)
    scores = score_model(variant, model, job.blocks, job.fresh, seed, own / "fresh")
    labels = {"variant": variant, "seed": seed}
    write_json(own / CELL_FILE, labels | {"figures": figures, "scores": scores})


def cell_folder(folder: Path, variant: str, seed: int) -> Path:
    """Where a cell's files are."""
    return folder / variant / f"seed_{seed}"


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: means over seeds, and mean differences from the first variant.

    Args:
        cells: contents of finished cells, those of the first variant first.

    Returns:
        Rows with `variant`, `seeds`, `eval_ce`, `relative_time` (of training, against the first
        variant), `norms` and `effective_ranks` a site, and per fresh grid point `NAME`: its
        compound CE increase, Σ L0 and CE increase a site.
    """
    names = list(dict.fromkeys(cell["variant"] for cell in cells))
    first = {cell["seed"]: cell for cell in cells if cell["variant"] == names[0]}
    return [
        _row([cell for cell in cells if cell["variant"] == name and cell["seed"] in first], first)
        for name in names
    ]


def _row(cells: list[dict[str, Any]], first: dict[int, dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": cells[0]["variant"], "seeds": [c["seed"] for c in cells]}
    row["eval_ce"] = [c["figures"]["eval_ce"] for c in cells]
    row["ce_cost"] = [
        c["figures"]["eval_ce"] - first[c["seed"]]["figures"]["eval_ce"] for c in cells
    ]
    row["relative_time"] = statistics.mean(
        c["figures"]["train_seconds"] / first[c["seed"]]["figures"]["train_seconds"] for c in cells
    )
    bases = [c["scores"]["baselines"] for c in cells]
    sites = bases[0]["residual_norm"]
    row["norms"] = [statistics.mean(b["residual_norm"][site] for b in bases) for site in sites]
    row["effective_ranks"] = [
        statistics.mean(effective_rank(b["spectrum"][site]) for b in bases) for site in sites
    ]
    row["compound"] = {
        point: [_find(c["scores"]["compound"], point)[0] for c in cells] for point in _points(cells)
    }
    row["sites"] = {
        point: [
            statistics.mean(values)
            for values in zip(
                *([r["ce_increase"] for r in _find(c["scores"]["rows"], point)] for c in cells),
                strict=True,
            )
        ]
        for point in _points(cells)
    }
    return row


def _mean_increase(found: list[dict[str, Any]] | None) -> str:
    return "–" if found is None else f"{statistics.mean(row['ce_increase'] for row in found):.3f}"


def _points(cells: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_name(row) for row in cells[0]["scores"]["compound"]))


def _name(row: dict[str, Any]) -> str:
    return f"{row['source']} {row['family']} {row['sparsity']:g}"


def _find(rows: list[dict[str, Any]], point: str) -> list[dict[str, Any]]:
    return [row for row in rows if _name(row) == point]


def shard_of(cells: list[tuple[str, int]], shard: list[int]) -> list[tuple[str, int]]:
    """Every N-th cell from the I-th on.

    Args:
        cells: of the whole study.
        shard: I and N.

    Raises:
        StudyError: unless 0 ≤ I < N.
    """
    if len(shard) != 2 or not 0 <= shard[0] < shard[1]:
        raise StudyError(f"shard is {shard}; give two numbers I N with 0 ≤ I < N.")
    return cells[shard[0] :: shard[1]]


def finished_cells(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Contents of the cells that are finished, variant by variant."""
    paths = [
        cell_folder(folder, variant, seed) / CELL_FILE
        for variant in study.variants
        for seed in study.seeds
    ]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of `table` as a Markdown table: a line a variant, means over seeds."""
    points = list(dict.fromkeys(point for row in rows for point in row["compound"]))
    head = ["variant", "seeds", "CE", "CE cost", "time", "‖x‖ a site", "effective rank a site"]
    lines = [[*head, *(f"compound, {point}" for point in points)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        measured = [row["compound"].get(point) for point in points]
        lines.append(
            [
                row["variant"],
                str(len(row["seeds"])),
                f"{statistics.mean(row['eval_ce']):.3f}",
                f"{statistics.mean(row['ce_cost']):+.3f}",
                f"{row['relative_time']:.2f}",
                ", ".join(f"{norm:.2g}" for norm in row["norms"]),
                ", ".join(f"{rank:.0f}" for rank in row["effective_ranks"]),
                *(
                    "–"
                    if found is None
                    else f"{statistics.mean(c['ce_increase'] for c in found):.3f}"
                    for found in measured
                ),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
