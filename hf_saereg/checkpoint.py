"""Which folder the name of a checkpoint means, checked before anything is loaded from it.

Notable:
- of a repository on the Hub only what is needed is downloaded: the configuration and the heads that
  are asked for, then the weights, all of one commit; for an adapter those of its base, too
- weights are read from safetensors alone; a repository that has only a pickle is refused, and the
  pickle is not even downloaded
"""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hf_saereg.errors import UserError
from hf_saereg.hub import fetch
from hf_saereg.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GENERATION_CONFIG,
    HEAD_FILES,
    HEADS_FOLDER,
    HOOK_NAME,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
)


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message says why."""


def find_checkpoint(
    name_or_path: str | Path,
    subfolder: str = "",
    hook_names: Sequence[str] | None = None,
    **options: Any,
) -> Path:
    """The folder of a GPT-2 checkpoint, or of an adapter for one, downloaded if need be.

    Args:
        name_or_path: a folder, or a repository on the Hub.
        subfolder: of either.
        hook_names: download the heads on these sites only; all by default.
        **options: those of `HUB_OPTIONS`.

    Raises:
        CheckpointError: if it is no GPT-2, its weights are not in safetensors, or a hook name is
            that of no residual stream.
        HubError: if the Hub cannot be reached, refuses, or has no such repository or revision.
    """
    folder, commit = _with_heads(name_or_path, subfolder, hook_names, options)
    base = _base_of_adapter(folder, name_or_path)
    if base is None:
        _check_is_gpt2(folder, name_or_path)
    if commit is not None:
        patterns = _below(subfolder, [*MODEL_WEIGHTS, GENERATION_CONFIG, ADAPTER_WEIGHTS])
        fetch(str(name_or_path), patterns, **{**options, "revision": commit})
    if base is not None:
        # `transformers` loads it; what is wrong with it is said here
        find_checkpoint(base, hook_names=[], **{**options, "revision": None})
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{name_or_path} has no weights in safetensors (model.safetensors), and weights in a "
            "pickle (pytorch_model.bin) are never loaded; convert them first."
        )
    return folder


def find_heads(
    name_or_path: str | Path,
    subfolder: str = "",
    hook_names: Sequence[str] | None = None,
    **options: Any,
) -> Path:
    """The folder that holds `saes/`; downloaded without the language model's weights if need be.

    Args:
        name_or_path: a folder, or a repository on the Hub.
        subfolder: of either.
        hook_names: download the heads on these sites only; all by default.
        **options: those of `HUB_OPTIONS`.

    Raises:
        CheckpointError: if a hook name is that of no residual stream.
        HubError: if the Hub cannot be reached, refuses, or has no such repository or revision.
    """
    return _with_heads(name_or_path, subfolder, hook_names, options)[0]


def check_hook_name(hook_name: str, place: str | Path) -> None:
    """Check that a hook name is that of a residual stream, and so leads out of no folder.

    Args:
        hook_name: as it was given or found.
        place: where, for the message.

    Raises:
        CheckpointError: if it is not.
    """
    if not HOOK_NAME.fullmatch(hook_name):
        raise CheckpointError(
            f"{hook_name!r} is no hook name of a residual stream (blocks.N.hook_resid_pre or "
            f"blocks.N.hook_resid_post); refusing to load it from {place}."
        )


def _with_heads(
    name_or_path: str | Path,
    subfolder: str,
    hook_names: Sequence[str] | None,
    options: dict[str, Any],
) -> tuple[Path, str | None]:
    """The folder with configuration and heads, and the commit that it is of."""
    for hook_name in hook_names or ():
        check_hook_name(hook_name, name_or_path)
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / subfolder, None
    heads = ["*"] if hook_names is None else hook_names
    names = [f"{HEADS_FOLDER}/{head}/{file}" for head in heads for file in HEAD_FILES]
    fetched = fetch(
        str(name_or_path), _below(subfolder, [MODEL_CONFIG, ADAPTER_CONFIG, *names]), **options
    )
    return fetched.folder / subfolder, fetched.commit


def _below(subfolder: str, names: Sequence[str]) -> list[str]:
    return [(PurePosixPath(subfolder) / name).as_posix() for name in names]


def _base_of_adapter(folder: Path, name_or_path: str | Path) -> str | None:
    """Name of the model that an adapter is for; None where the folder holds a model."""
    path = folder / ADAPTER_CONFIG
    if (folder / MODEL_CONFIG).is_file() or not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it.") from error
    if not base:
        raise CheckpointError(f"The adapter of {name_or_path} names no base model to put it on.")
    return base


def _check_is_gpt2(folder: Path, name_or_path: str | Path) -> None:
    path = folder / MODEL_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{name_or_path} has no {MODEL_CONFIG}, so it holds no model.")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it.") from error
    if model_type != "gpt2":
        raise CheckpointError(
            f"{name_or_path} holds a model of type {model_type!r}; only GPT-2 ('gpt2') takes heads."
        )
