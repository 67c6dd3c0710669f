"""What fine-tunings led to, side by side: a line a run, from the files that it left.

    RUN/run.json             of `recipes/finetune_gpt2.py`
    RUN/sweep/results.json   of `saereg sweep` on what came out, if fresh SAEs were fitted to it

Notable:
- runs are comparable only if they start from one model and are evaluated on one text
- fresh SAEs are compared at equal Σ L0 inside the range that those on every run reached
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hf_saereg.report.findings import l0_text, signed
from hf_saereg.report.results import ReportError, read_as, read_json
from hf_saereg.report.swept import RESULTS_FILE, SweptModel, read_runs
from hf_saereg.report.swept_curves import compare, cotrained, variants

RUN_FILE = "run.json"
SWEEP_FOLDER = "sweep"
SHARED = (
    *("model_name_or_path", "dataset", "dataset_config", "dataset_revision", "text_column"),
    *("text_share", "max_characters", "train_fraction", "split_multiple", "block_size"),
    *("join_with_eos", "stream", "stream_eval_blocks"),
)
HEAD = ("run", "mode", "λ", "parameters trained", "validation CE", "KL to base", "seconds")
MISSING = "–"


@dataclass(frozen=True)
class TunedOptions:
    """What a run was asked for."""

    mode: str
    reconstruction_weight: tuple[float, ...]

    @property
    def weight(self) -> str:
        """λ, where the mode's loss has it."""
        if self.mode in ("plain", "lora_frozen_heads"):
            return MISSING
        return ", ".join(f"{weight:g}" for weight in self.reconstruction_weight)


@dataclass(frozen=True)
class TunedFigures:
    """What a run measured at its end: nats a token, parameters, seconds of training steps."""

    eval_ce: float
    train_seconds: float
    trained_parameters: float
    kl_to_base: float | None = None


@dataclass(frozen=True)
class TunedRecord:
    """What is read of `run.json`."""

    options: TunedOptions
    figures: TunedFigures


class TunedRun(NamedTuple):
    """One fine-tuning.

    Attributes:
        name: of its folder.
        record: options and figures.
        swept: SAEs on what came out; None if none were fitted.
    """

    name: str
    record: TunedRecord
    swept: SweptModel | None


def read_tuned(folders: Sequence[Path]) -> list[TunedRun]:
    """Fine-tunings that can stand side by side.

    Args:
        folders: of finished runs.

    Raises:
        ReportError: if one is missing, damaged or not finished, or they start from several models
            or are evaluated on several texts.
    """
    contents = {folder: read_json(folder / RUN_FILE) for folder in folders}
    for folder, content in contents.items():
        if not content.get("figures"):
            raise ReportError(f"{folder} is not finished: continue it, or leave it out.")
    _check_shared(contents)
    return [
        TunedRun(folder.resolve().name, _record(folder, content), _swept(folder))
        for folder, content in contents.items()
    ]


def markdown(runs: Sequence[TunedRun]) -> str:
    """A Markdown table, a line a run; ends with a newline.

    After what training cost and led to: the compound CE increase of fresh SAEs, a column a variant,
    at the lowest, a middle and the highest Σ L0 that all runs share, and that of a run's own heads.

    Args:
        runs: of `read_tuned`.
    """
    swept = [run.swept for run in runs if run.swept]
    columns = _fresh_columns(swept)
    lines = [[*HEAD, *columns, "own heads (Σ L0)"]]
    lines.append(["---"] * len(lines[0]))
    for run in runs:
        fresh = [
            cells[swept.index(run.swept)] if run.swept else MISSING for cells in columns.values()
        ]
        lines.append([*_training(run), *fresh, _own_heads(run.swept)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _check_shared(contents: Mapping[Path, Mapping[str, object]]) -> None:
    (first, expected), *others = (
        (folder, content.get("options", {})) for folder, content in contents.items()
    )
    for folder, options in others:
        for name in SHARED:
            if options.get(name) != expected.get(name):
                raise ReportError(
                    f"{name} is {expected.get(name)!r} in {first} and {options.get(name)!r} in "
                    f"{folder}; give fine-tunings of one model that are evaluated on one text."
                )


def _record(folder: Path, content: Mapping[str, object]) -> TunedRecord:
    try:
        return read_as(TunedRecord, content)
    except ReportError as error:
        raise ReportError(f"{folder / RUN_FILE}: {error}") from error


def _swept(folder: Path) -> SweptModel | None:
    sweep = folder / SWEEP_FOLDER
    if not (sweep / RESULTS_FILE).is_file():
        return None
    (model,) = read_runs([sweep])
    return model


def _training(run: TunedRun) -> list[str]:
    options, figures = run.record.options, run.record.figures
    kl = MISSING if figures.kl_to_base is None else signed(figures.kl_to_base)
    return [
        f"`{run.name}`",
        f"`{options.mode}`",
        options.weight,
        f"{figures.trained_parameters:,.0f}",
        signed(figures.eval_ce),
        kl,
        f"{figures.train_seconds:.0f}",
    ]


def _fresh_columns(swept: Sequence[SweptModel]) -> dict[str, list[str]]:
    """By heading, a cell a model: the CE increase at three Σ L0s."""
    columns = {}
    for variant in variants(swept):
        points = compare(swept, variant)
        chosen = points[:: max(1, len(points) // 2)]  # the ends and the middle
        l0s = _joined(l0_text(point.l0) for point in chosen) or "none shared"
        of_models = zip(*(point.ce_increase for point in chosen), strict=True)
        columns[f"fresh {variant.label}, Σ L0 {l0s}"] = [
            MISSING if None in costs else _joined(map(signed, costs)) for costs in of_models
        ] or [MISSING] * len(swept)
    return columns


def _own_heads(model: SweptModel | None) -> str:
    found = cotrained(model.sets) if model else []
    costs = [f"{signed(row.ce_increase)} ({l0_text(row.sum_l0)})" for row in found]
    return ", ".join(costs) or MISSING


def _joined(words: Iterable[str]) -> str:
    return " / ".join(words)
