"""An interrupted cell on disk: heads, moments and steps, as safetensors.

Notable:
- a file a cell: whatever number of processes goes on with a sweep finds every cell where it was
- written beside its place and moved there: a killed process leaves the old file or the new
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_saereg.errors import UserError
from hf_saereg.sweep import CellTraining, Track


class SweepStateError(UserError):
    """A kept cell cannot be gone on with; the message says why."""


def save_state(training: CellTraining, path: Path) -> None:
    """Keep a cell as it is.

    Args:
        training: between two steps.
        path: in a folder that is created if absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tracks = {name: track for name, track in _tracks(training).items() if track is not None}
    tensors = {
        f"{name}.{key}": tensor
        for name, track in tracks.items()
        for key, tensor in _tensors(track).items()
    }
    unfinished = path.with_name(path.name + ".tmp")
    steps = {name: str(track.step) for name, track in tracks.items()}
    save_file(tensors, unfinished, steps)
    unfinished.replace(path)


def load_state(training: CellTraining, path: Path, half_length: int) -> None:
    """Bring a cell to where it was kept.

    Args:
        training: of the same cell, not yet begun.
        path: that `save_state` was given.
        half_length: steps of the shorter training.

    Raises:
        SweepStateError: if the file is damaged, or of other heads.
    """
    try:
        with safe_open(path, "pt") as file:
            steps = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if "half" in steps:
            training.half = training.whole.branch(half_length)
        for name, step in steps.items():
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.")
            }
            _restore(_tracks(training)[name], own, int(step))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise SweepStateError(
            f"{path} cannot be gone on with ({reason}); delete it to train that cell anew."
        ) from error


def _tracks(training: CellTraining) -> dict[str, Track | None]:
    return {"whole": training.whole, "half": training.half}


def _tensors(track: Track) -> dict[str, Tensor]:
    heads = {f"heads.{name}": tensor for name, tensor in track.bank.state_dict().items()}
    moments = {
        f"adam.{index}.{name}": tensor
        for index, own in track.optimizer.state_dict()["state"].items()
        for name, tensor in own.items()
    }
    # clones: stacked heads share their memory, which the format has no word for
    return {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in (heads | moments).items()
    }


def _restore(track: Track, tensors: dict[str, Tensor], step: int) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    heads = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "adam":
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = tensor
        else:
            heads[name] = tensor
    with torch.no_grad():
        track.bank.load_state_dict(heads)
    groups = track.optimizer.state_dict()["param_groups"]
    track.optimizer.load_state_dict({"state": state, "param_groups": groups})
    track.step = step
