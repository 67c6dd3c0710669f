"""The cells of a study: trained, scored, kept; what is finished is never run again.

    DIR/VARIANT/seed_N/run.json           its options, versions, commit
    DIR/VARIANT/seed_N/cell.json          figures and scores, written last
    DIR/VARIANT/seed_N/budget.json        steps of a control that trains as long as another variant
    DIR/VARIANT/seed_N/transplanted.json  its co-trained heads on the baseline of the same seed

Notable:
- several processes may share a study: each takes the cells of its shard
- a control's steps are written down before it trains, so that a resumed training has the same
- a finished cell is used only if `run.json` has the options that the study's file gives it now
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hf_saereg.character import OPTION_CLASSES, CharacterJob
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.fresh import fidelity_batches, score_model
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.options import as_record, as_words, parse_options
from hf_saereg.run_folder import RUN_FILE, check_run_folder, write_json
from hf_saereg.study import REGULARIZED, TRAIN_SECONDS_OF, UNTRAINED, Study, StudyError

CELL_FILE = "cell.json"
BUDGET_FILE = "budget.json"
TRANSPLANTED_FILE = "transplanted.json"


@dataclass(frozen=True)
class StudyCell:
    """One variant at one seed, whose options were found usable.

    Attributes:
        variant: its name.
        seed: of model, text order and fresh heads.
        folder: its own.
        model: `plain`, `regularized` or `untrained`.
        job: its trainings.
        budget: of a control that trains as long as another variant; None for any other.
    """

    variant: str
    seed: int
    folder: Path
    model: str
    job: CharacterJob
    budget: dict[str, Any] | None = None

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
        own, budget = cell_folder(folder, variant, seed), _budget(study, variant, seed, folder)
        job = CharacterJob.from_options(_words(study, variant, seed, own, budget))
        if job.arguments.push_to_hub:
            raise StudyError("A study publishes nothing; push the folder of a finished model.")
        if budget is not None:  # after the folder was found free, before anything is trained
            write_json(own / BUDGET_FILE, budget)
        return cls(variant, seed, own, study.model_of(variant), job, budget)

    def run(self) -> None:
        """Train and score; leaves `cell.json`."""
        job = self.job
        model, figures = job.untrained() if self.model == UNTRAINED else job.train(self.model)
        scores = score_model(
            self.variant, model, job.blocks, job.fresh.sweep(self.seed), self.folder / "fresh"
        )
        content = {"variant": self.variant, "seed": self.seed, "model": self.model}
        content |= {"figures": figures, "scores": scores}
        write_json(
            self.folder / CELL_FILE, content | ({"budget": self.budget} if self.budget else {})
        )


def _words(
    study: Study, variant: str, seed: int, own: Path, budget: dict[str, Any] | None
) -> list[str]:
    """Command line of a cell's trainings."""
    options = dict(study.variants[variant])
    options.pop("model", None)
    options.pop(TRAIN_SECONDS_OF, None)
    if budget is not None:
        options["max_steps"] = budget["max_steps"]
    words = ["--config", str(study.base), *as_words(options), "--seed", str(seed)]
    return [*words, "--output_dir", str(own), "--resume_from_checkpoint", "true"]


def check_finished(study: Study, variant: str, seed: int, folder: Path) -> bool:
    """Check that a finished cell was made with the options that the study gives it now.

    Args:
        study: what it is a cell of.
        variant: its name.
        seed: of everything in it.
        folder: of the study, which may have been moved since.

    Returns:
        Whether it could be checked: it cannot where its `run.json` is gone.

    Raises:
        RunFolderError: if an option was another one.
        StudyError: if it was another model, or a control of another variant.
    """
    own = cell_folder(folder, variant, seed)
    if not (own / RUN_FILE).is_file():
        return False
    cell = json.loads((own / CELL_FILE).read_text())
    budget = cell.get("budget")
    _check_kind(study, variant, own, cell["model"], budget)
    words = _words(study, variant, seed, own, budget)
    options = as_record(parse_options(*OPTION_CLASSES, arguments=words))
    check_run_folder(own, options, resume=True, may_differ=frozenset({"output_dir"}))
    return True


def _check_kind(
    study: Study, variant: str, own: Path, model: str, budget: dict[str, Any] | None
) -> None:
    """Check what a variant is beside its options: which model it trains, and for how long."""
    donors = study.donors(variant)
    now = {"model": study.model_of(variant), TRAIN_SECONDS_OF: donors and donors[0]}
    before = {"model": model, TRAIN_SECONDS_OF: budget and budget[TRAIN_SECONDS_OF]}
    for name in now:
        if now[name] != before[name]:
            raise StudyError(
                f"{own} was made for another variant ({name} was {before[name]!r}, now "
                f"{now[name]!r}); choose another output_dir or delete that folder."
            )


def is_ready(study: Study, variant: str, seed: int, folder: Path) -> bool:
    """Whether all that a cell waits for is finished; only controls wait."""
    donors = study.donors(variant)
    if donors is None or (cell_folder(folder, variant, seed) / BUDGET_FILE).is_file():
        return True
    return all(is_finished(folder, donor, seed) for donor in donors)


def _budget(study: Study, variant: str, seed: int, folder: Path) -> dict[str, Any] | None:
    donors = study.donors(variant)
    if donors is None:
        return None
    own = cell_folder(folder, variant, seed)
    if (own / BUDGET_FILE).is_file():
        budget = json.loads((own / BUDGET_FILE).read_text())
        _check_kind(study, variant, own, study.model_of(variant), budget)
        return budget
    timed, plain = (_figures(folder, donor, seed) for donor in donors)
    seconds_per_step = plain["train_seconds"] / plain["steps"]
    return {
        TRAIN_SECONDS_OF: donors[0],
        "train_seconds": timed["train_seconds"],
        "plain_seconds_per_step": seconds_per_step,
        "max_steps": max(1, round(timed["train_seconds"] / seconds_per_step)),
    }


def _figures(folder: Path, variant: str, seed: int) -> dict[str, Any]:
    return json.loads((cell_folder(folder, variant, seed) / CELL_FILE).read_text())["figures"]


def transplant(study: Study, variant: str, seed: int, folder: Path) -> bool:
    """Score a variant's co-trained heads on the baseline of the same seed, unless done before.

    Args:
        study: what it is a cell of.
        variant: its name.
        seed: of both.
        folder: of the study.

    Returns:
        Whether they are scored; they cannot be where there are no heads, or the weights are gone.
    """
    own, plain = (cell_folder(folder, name, seed) for name in (variant, study.baseline))
    if (own / TRANSPLANTED_FILE).is_file():
        return True
    donor, target = own / REGULARIZED, plain / study.model_of(study.baseline)
    finished = all(is_finished(folder, name, seed) for name in (variant, study.baseline))
    if variant == study.baseline or not finished or not _are_models(donor, target):
        return False
    job = StudyCell.prepare(study, variant, seed, folder).job
    model = SAERegGPT2LMHeadModel.load_whole(target)
    model.load_heads(donor)
    model.eval()
    batches = fidelity_batches(job.blocks["validation"], job.fresh.fidelity_blocks, model.config)
    scores = fidelity(model, model.heads, batches, baselines(model, batches))
    rows = [
        {"site": name, **effect.figures(), **statistics.figures()}
        for name, (effect, statistics) in scores.sites.items()
    ]
    compound = {"sum_l0": scores.compound_l0, **scores.compound.figures()}
    write_json(own / TRANSPLANTED_FILE, {"rows": rows, "compound": compound})
    return True


def _are_models(*folders: Path) -> bool:
    return all((folder / "config.json").is_file() for folder in folders)


def cell_folder(folder: Path, variant: str, seed: int) -> Path:
    """Where a cell's files are."""
    return folder / variant / f"seed_{seed}"


def is_finished(folder: Path, variant: str, seed: int) -> bool:
    """Whether a cell was run to its end."""
    return (cell_folder(folder, variant, seed) / CELL_FILE).is_file()


def finished_cells(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Contents of the cells that are finished, variant by variant, with `transplanted` or None."""
    cells = []
    for variant in study.variants:
        for seed in study.seeds:
            if is_finished(folder, variant, seed):
                own = cell_folder(folder, variant, seed)
                cell = json.loads((own / CELL_FILE).read_text())
                path = own / TRANSPLANTED_FILE
                cell["transplanted"] = json.loads(path.read_text()) if path.is_file() else None
                cells.append(cell)
    return cells
