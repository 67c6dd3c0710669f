"""Fresh heads fitted to one model, scored, and kept: whatever was finished is never done again.

    FOLDER/baselines.json               clean and ablated CE of the model
    FOLDER/unfinished/CELL.safetensors  cells in training, every so many steps
    FOLDER/saes/CELL/saes/HOOK_NAME/    heads of a finished cell, in SAELens's layout
    FOLDER/cells/CELL.json              its scores, written last
    FOLDER/seconds.json                 time that it took, over all sessions

Notable:
- processes share the cells, each with a forward pass of its own, and all of them the baselines
- fresh heads are scored at half of their training too, so that a reader sees how far they still
  moved
- the model's own heads, where it has some, are a cell of their own
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import GPT2Config

from hf_saereg.corpora import collate_blocks
from hf_saereg.fidelity import Batch, baselines, fidelity, fidelity_of_each
from hf_saereg.grid import Cell, Sweep
from hf_saereg.heads.folder import save_heads
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.run_folder import write_json
from hf_saereg.scores import Baselines, Fidelity
from hf_saereg.sweep import CellTraining, SharedTraining
from hf_saereg.sweep_state import load_state, save_state

FIDELITY_BATCH_SIZE = 32
LOGITS_AT_ONCE = 2**26  # as float32, 256 MiB
COTRAINED = "cotrained"


def score_model(
    name: str,
    model: SAERegGPT2LMHeadModel,
    blocks: DatasetDict,
    sweep: Sweep,
    folder: Path,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Fit fresh heads to a frozen model and score them, and its own heads if it has some.

    Args:
        name: of the model in all tables.
        model: left as it is, but in evaluation mode.
        blocks: `train` and `validation`.
        sweep: which heads, and how they are trained.
        folder: for heads and scores; what is finished there is not done again.
        accelerator: whose processes share the work; every process must call this.

    Returns:
        `rows`, `compound`, `baselines` and `seconds` of all that is finished in the folder,
        JSON-serialisable.

    Raises:
        DivergedError: if a fresh head's weights are no longer finite; nothing of that is kept.
    """
    model = model.eval()
    kept = _Kept(folder, is_main=accelerator is None or accelerator.is_main_process)
    batches = fidelity_batches(blocks["validation"], sweep.fidelity_blocks, model.config)
    unfinished = [cell for cell in sweep.cells if not kept.is_finished(cell.name)]
    base = kept.baselines()
    if accelerator is not None:  # nobody may finish anything before all have looked
        accelerator.wait_for_everyone()
        unfinished = unfinished[accelerator.process_index :: accelerator.num_processes]
    if base is None:
        base = baselines(model, batches, accelerator)
        kept.keep_baselines(base)
    if model.heads and kept.is_main and not kept.is_finished(COTRAINED):
        scores = fidelity(model, model.heads, batches, base)
        rows, compound = _rows({"model": name, **labels_of_own(model)}, scores, None)
        rows = [row | {"sparsity": model.heads[row["site"]].config.sparsity} for row in rows]
        kept.finish(COTRAINED, rows, compound)
    kept.lap("fidelity")
    if unfinished:
        shared = SharedTraining.of(model, blocks["train"], sweep.schedule, sweep.seed)
        for cells in sweep.groups(unfinished):
            trained = _train(name, shared, cells, sweep, kept)
            for training in _bar(trained, f"Scoring them on {name}", kept):
                heads = shared.finished(training)
                whole, half = fidelity_of_each(model, heads._asdict(), batches, base).values()
                save_heads(heads.whole, kept.heads_folder(training.cell), {"model_name": name})
                kept.finish(training.cell.name, *_rows(_labels(name, training.cell), whole, half))
                kept.lap("fidelity")
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return kept.results(name, [cell.name for cell in sweep.cells])


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


def labels_of_own(model: SAERegGPT2LMHeadModel) -> dict[str, Any]:
    """Family, source, sparsity and size of a model's own heads; what differs by site is joined."""
    configs = model.heads.configs
    return {
        "family": configs[0].architecture,
        "source": COTRAINED,
        "sparsity": _in_common([own.sparsity for own in configs]),
        "d_sae": _in_common([own.d_sae for own in configs]),
        "seed": None,  # theirs is the model's, which its files do not tell
    }


class _Kept:
    """The files of a folder; see the top of this module."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self.folder = folder
        self.is_main = is_main
        self._lap_started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cells").mkdir(exist_ok=True)

    def is_finished(self, name: str) -> bool:
        return (self.folder / "cells" / f"{name}.json").is_file()

    def baselines(self) -> Baselines | None:
        path = self.folder / "baselines.json"
        return Baselines(**json.loads(path.read_text())) if path.is_file() else None

    def keep_baselines(self, base: Baselines) -> None:
        if self.is_main:
            write_json(self.folder / "baselines.json", base._asdict())

    def heads_folder(self, cell: Cell) -> Path:
        return self.folder / "saes" / cell.name

    def state_file(self, name: str) -> Path:
        return self.folder / "unfinished" / f"{name}.safetensors"

    def finish(self, name: str, rows: list[dict[str, Any]], compound: dict[str, Any]) -> None:
        write_json(self.folder / "cells" / f"{name}.json", {"rows": rows, "compound": compound})
        self.state_file(name).unlink(missing_ok=True)

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as this phase's."""
        now = time.monotonic()
        elapsed, self._lap_started = now - self._lap_started, now
        if self.is_main:
            seconds = self.seconds()
            write_json(self.folder / "seconds.json", seconds | {phase: seconds[phase] + elapsed})

    def seconds(self) -> dict[str, float]:
        path = self.folder / "seconds.json"
        return json.loads(path.read_text()) if path.is_file() else {"fresh": 0.0, "fidelity": 0.0}

    def results(self, name: str, order: Sequence[str]) -> dict[str, Any]:
        found = {
            path.stem: json.loads(path.read_text())
            for path in sorted((self.folder / "cells").glob("*.json"))
        }
        asked = [cell for cell in order if cell in found]
        others = [cell for cell in found if cell not in order and cell != COTRAINED]
        own = [COTRAINED] if COTRAINED in found else []
        cells = [found[cell] for cell in (*asked, *others, *own)]
        base = self.baselines()
        return {
            "rows": [row for cell in cells for row in cell["rows"]],
            "compound": [cell["compound"] for cell in cells],
            "baselines": base and base._asdict(),
            "seconds": {f"{phase}_{name}": spent for phase, spent in self.seconds().items()},
        }


def _train(
    name: str, shared: SharedTraining, cells: Sequence[Cell], sweep: Sweep, kept: _Kept
) -> list[CellTraining]:
    trainings = []
    for cell in cells:
        training = shared.start(cell)
        if kept.state_file(cell.name).is_file():
            load_state(training, kept.state_file(cell.name), sweep.schedule.half)
        trainings.append(training)

    def keep(step: int) -> None:
        if step % sweep.save_steps == 0 or step == sweep.schedule.steps:
            for training in trainings:
                training.check_finite()
                save_state(training, kept.state_file(training.cell.name))
            kept.lap("fresh")

    shared.run(trainings, f"Fresh SAEs on {name}", keep, show_progress=kept.is_main)
    return trainings


def _bar(trainings: list[CellTraining], description: str, kept: _Kept) -> tqdm:
    return tqdm(trainings, description, dynamic_ncols=True, disable=not kept.is_main)


def _labels(name: str, cell: Cell) -> dict[str, Any]:
    labels = {"model": name, "family": cell.architecture, "source": "fresh"}
    sizes = {"d_sae": _in_common(cell.d_sae)}
    return labels | {"sparsity": cell.sparsity, **sizes, "seed": cell.seed}


def _in_common(values: Sequence[float]) -> float | str:
    return values[0] if len(set(values)) == 1 else "-".join(f"{value:g}" for value in values)


def _rows(
    labels: dict[str, Any], scores: Fidelity, halfway: Fidelity | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row a site, and one of all sites at once."""
    rows = [
        {
            **labels,
            "d_sae": len(statistics.fired),
            "site": hook_name,
            **effect.figures(),
            **statistics.figures(),
            "explained_variance": statistics.explained_variance,
            "density_histogram": statistics.density_histogram()._asdict(),
            "ce_increase_at_half": halfway and halfway.sites[hook_name].effect.ce_increase,
        }
        for hook_name, (effect, statistics) in scores.sites.items()
    ]
    compound = {
        **labels,
        "sum_l0": scores.compound_l0,
        **scores.compound.figures(),
        "ce_increase_at_half": halfway and halfway.compound.ce_increase,
    }
    return rows, compound
