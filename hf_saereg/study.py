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
from hf_saereg.errors import UserError
from hf_saereg.fresh import score_model
from hf_saereg.options import as_words
from hf_saereg.resuming import STATE_FILE
from hf_saereg.run_folder import write_json
from hf_saereg.scores import effective_rank

CELL_FILE = "cell.json"
REGULARIZED = "regularized"


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
        variants = {str(name): options or {} for name, options in content["variants"].items()}
        if wrong := [name for name in variants if "/" in name or name in (".", "..")]:
            raise StudyError(
                f"A variant in {path} is called {wrong[0]!r}, but its name is to be a folder's; "
                "leave out the slash."
            )
        return cls(path.parent / content["base"], content["seeds"], variants)

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def cells(self) -> list[tuple[str, int]]:
        """Variant and seed of every cell, one seed after the other."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


@dataclass(frozen=True)
class StudyCell:
    """One variant at one seed, whose options were found usable.

    Attributes:
        variant: its name.
        seed: of model, text order and fresh heads.
        folder: its own.
        model: `plain` or `regularized`.
        job: its trainings.
    """

    variant: str
    seed: int
    folder: Path
    model: str
    job: CharacterJob

    @classmethod
    def prepare(cls, study: Study, variant: str, seed: int, folder: Path) -> Self:
        """Check the options of a cell, and begin its folder.

        Args:
            study: what it is a cell of.
            variant: its name.
            seed: of everything in it.
            folder: of the study.

        Raises:
            UserError: if the options cannot be used, or the folder holds another run.
        """
        own, options = cell_folder(folder, variant, seed), dict(study.variants[variant])
        model = options.pop("model", REGULARIZED)
        words = ["--config", str(study.base), *as_words(options)]
        words += ["--seed", str(seed), "--output_dir", str(own), "--resume_from_checkpoint", "true"]
        job = CharacterJob.from_options(words)
        if job.arguments.push_to_hub:
            raise StudyError("A study publishes nothing; push the folder of a finished model.")
        return cls(variant, seed, own, model, job)

    def run(self) -> None:
        """Train and score; leaves `cell.json`."""
        job = self.job
        model, figures = job.train(self.model)
        sweep = job.fresh.sweep(self.seed)
        scores = score_model(self.variant, model, job.blocks, sweep, self.folder / "fresh")
        labels = {"variant": self.variant, "seed": self.seed}
        write_json(self.folder / CELL_FILE, labels | {"figures": figures, "scores": scores})


def cell_folder(folder: Path, variant: str, seed: int) -> Path:
    """Where a cell's files are."""
    return folder / variant / f"seed_{seed}"


def is_finished(folder: Path, variant: str, seed: int) -> bool:
    """Whether a cell was run to its end."""
    return (cell_folder(folder, variant, seed) / CELL_FILE).is_file()


def steered_trainings(
    study: Study, folder: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Log and target of every finished variant that has a target, at the first seed."""
    logs, targets = {}, {}
    for variant, options in study.variants.items():
        seed = study.seeds[0]
        if options.get("target_l0") and is_finished(folder, variant, seed):
            own = cell_folder(folder, variant, seed)
            state = json.loads((own / REGULARIZED / STATE_FILE).read_text())
            logs[variant], targets[variant] = state["log_history"], options["target_l0"][0]
    return logs, targets


def table(cells: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One row a variant: means over seeds, and mean differences from the baseline.

    Args:
        cells: contents of finished cells; those of seeds that the baseline lacks are left out.
        baseline: the variant that the others are compared with.

    Returns:
        Rows with `variant`, `seeds`, `eval_ce`, `relative_time` (of training, against the
        baseline), `norms` and `effective_ranks` a site, and per fresh grid point `NAME`: its
        compound CE increase, Σ L0 and CE increase a site.
    """
    first = {cell["seed"]: cell for cell in cells if cell["variant"] == baseline}
    paired: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["seed"] in first:
            paired.setdefault(cell["variant"], []).append(cell)
    return [_row(own, first) for own in paired.values()]


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
    return [
        json.loads((cell_folder(folder, variant, seed) / CELL_FILE).read_text())
        for variant in study.variants
        for seed in study.seeds
        if is_finished(folder, variant, seed)
    ]


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
                *map(_mean_increase, measured),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
