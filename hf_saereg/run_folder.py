"""A run's folder: `run.json` says what it holds, and nothing in it is overwritten by another run.

Notable:
- resolved options, versions, commit, seed, processes, device and time are enough to run it again
- a folder is continued only by the same options, and before its end by as many processes
- JSON is written beside its place and moved there: a killed process leaves the old file or the new
"""

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_saereg.errors import UserError

RUN_FILE = "run.json"
RECORD_KEYS = {"options", "figures", "world_size", "wall_seconds"}  # that a continuation reads
PACKAGES = ("hf-saereg", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numba")
# what may differ between a run and its continuation: how it is watched, waited for and published,
# not what it computes
CONTINUATION_OPTIONS = {
    *("resume_from_checkpoint", "disable_tqdm", "logging_dir", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token"),
    *("hub_private_repo", "hub_always_push", "hub_revision"),
    "ddp_timeout",
}


class RunFolderError(UserError):
    """An output folder cannot be used; the message says why."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one move, so that no reader ever finds half a file.

    Args:
        path: in an existing folder.
        content: JSON-serialisable.
    """
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2))
    unfinished.replace(path)


def check_run_folder(
    folder: Path, options: dict[str, Any], resume: bool, may_differ: frozenset[str] = frozenset()
) -> None:
    """Check that a folder is free for a run, or is this run's own. Writes nothing.

    Args:
        folder: need not exist.
        options: resolved options, JSON-serialisable.
        resume: whether a folder of the same run may be continued.
        may_differ: options beside `CONTINUATION_OPTIONS` in which that run may differ.

    Raises:
        RunFolderError: if it holds another run, this one without `resume`, or other files, or its
            `run.json` cannot be read.
    """
    record = _read_record(folder)
    if record is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFolderError(
                f"{folder} is not empty and holds no {RUN_FILE}; choose another output_dir."
            )
        return
    before = record["options"]
    options = json.loads(json.dumps(options))
    # an option of a later version that is off changes nothing
    added = {name for name in options.keys() - before.keys() if not options[name]}
    free = CONTINUATION_OPTIONS | may_differ | added
    for name in sorted((before.keys() | options.keys()) - free):
        if before.get(name) != options.get(name):
            raise RunFolderError(
                f"{folder} holds another run ({name} was {before.get(name)!r}, now "
                f"{options.get(name)!r}); choose another output_dir or delete that folder."
            )
    if not resume:
        raise RunFolderError(
            f"{folder} already holds this run; add --resume_from_checkpoint true to continue it, "
            "or choose another output_dir."
        )


def finished_figures(folder: Path) -> dict[str, Any] | None:
    """The figures that a finished run left in `run.json`; None while it is not finished.

    Args:
        folder: need not exist.

    Raises:
        RunFolderError: if `run.json` cannot be read.
    """
    record = _read_record(folder)
    return record and record["figures"]


def recorded_fingerprint(folder: Path) -> str | None:
    """SHA-256 of the model that a sweep's heads were trained on; None where no `run.json` says it.

    Args:
        folder: of the sweep, or any other.

    Raises:
        RunFolderError: if `run.json` cannot be read.
    """
    record = _read_record(folder)
    return record and record["options"].get("model_sha256")


def _read_record(folder: Path) -> dict[str, Any] | None:
    """`run.json` of a folder, None where there is none."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no valid JSON"
        raise RunFolderError(
            f"{path} cannot be read ({reason}); choose another output_dir or delete that folder."
        ) from error
    if not (isinstance(record, dict) and record.keys() >= RECORD_KEYS):
        raise RunFolderError(
            f"{path} is not what a run of this package writes; choose another output_dir."
        )
    return record


def earlier_seconds(folder: Path) -> float:
    """What `run.json` says that the sessions of a run took until now; 0 where it says nothing.

    Args:
        folder: need not exist.

    Raises:
        RunFolderError: if `run.json` cannot be read.
    """
    record = _read_record(folder)
    return (record and record["wall_seconds"]) or 0.0


def write_run(
    folder: Path,
    arguments: TrainingArguments,
    options: dict[str, Any],
    figures: dict[str, Any] | None = None,
) -> None:
    """Write `run.json`, on the main process alone.

    Args:
        folder: created if absent.
        arguments: of the run's processes, device and seed.
        options: resolved options, JSON-serialisable.
        figures: what came out, `wall_seconds` among them; given once the run is finished.

    Raises:
        RunFolderError: if other than as many processes began this run, and it is not finished.
    """
    if arguments.should_save:
        _check_processes(folder, arguments.world_size)
        about = (arguments.seed, arguments.world_size, arguments.device)
        write_record(folder, options, *about, figures)


def _check_processes(folder: Path, world_size: int) -> None:
    """A batch is shared out among the processes, so that with another number it is another one."""
    record = _read_record(folder)
    if record is None or record["figures"]:
        return
    if record["world_size"] != world_size:
        raise RunFolderError(
            f"{folder} holds an unfinished run whose batch another number of processes would change"
            f" (world_size was {record['world_size']}, now {world_size}); launch "
            f"{record['world_size']} again, or choose another output_dir."
        )


def write_record(
    folder: Path,
    options: dict[str, Any],
    seed: int,
    world_size: int,
    device: torch.device,
    figures: dict[str, Any] | None = None,
) -> None:
    """Write `run.json`; called by the main process. Until there are figures, its time stays.

    Args:
        folder: created if absent.
        options: resolved options, JSON-serialisable.
        seed: of the run.
        world_size: its processes.
        device: of the main process.
        figures: what came out, `wall_seconds` among them; given once the run is finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "seed": seed,
        "world_size": world_size,
        "device": str(device),
        "wall_seconds": figures["wall_seconds"] if figures else earlier_seconds(folder) or None,
        "command": command_line(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "git_commit": _git_commit(),
        "threads": torch.get_num_threads(),
        "options": options,
        "figures": figures,
    }
    write_json(folder / RUN_FILE, record)


def package_versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers, by package."""
    return {package: version(package) for package in PACKAGES}


def command_line() -> str:
    """How this program was started, without the value of any `--…_token`."""
    return re.sub(r"(--\w+[-_]token[= ])\S+", r"\1***", " ".join(sys.argv))


def _git_commit() -> str | None:
    """Of this package's own repository; one that it is merely installed in says nothing of it."""
    source = Path(__file__).resolve().parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        found = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    if found.returncode or not (source / "setup.cfg").is_file():
        return None
    top, commit = found.stdout.splitlines()
    return commit if Path(top).resolve() == source else None
