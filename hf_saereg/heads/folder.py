"""Heads on disk: `saes/<hook_name>/cfg.json` + `sae_weights.safetensors`, SAELens's own layout.

Notable:
- SAELens loads each folder as it is; what only we need sits in `metadata.saereg`
- what comes from a downloaded folder is checked before it is used: hook names are the two forms
  that a residual stream has, so none can leave the folder; weights are tensors only, never a pickle
- what SAELens's form does not hold to the last bit, such as the logarithm of a threshold, lies
  beside it in `training_state.safetensors`, so that a resumed run goes on exactly
- the root of a checkpoint knows nothing of heads: deleting `saes/` discards them
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_saereg.checkpoint import check_hook_name
from hf_saereg.errors import UserError
from hf_saereg.heads import make_head
from hf_saereg.heads.base import HeadConfigError, SAEHead, SAEHeadConfig
from hf_saereg.heads.config import SkipOptions
from hf_saereg.layout import (
    CONFIG_FILE,
    HEADS_FOLDER,
    HOOK_NAME,
    TRAINING_FILE,
    WEIGHTS_FILE,
    without_folder,
)

FORMAT_VERSION = 1

# what SAELens's own fields say of a head; the rest of its configuration is ours
SAELENS_FIELDS = ("d_in", "d_sae")
OUR_FIELDS = tuple(
    field.name
    for field in fields(SAEHeadConfig)
    if field.name not in (*SAELENS_FIELDS, "hook_name")
)
# what files of the first versions lack: every token was read
LATER_FIELDS = tuple(field.name for field in fields(SkipOptions))

# whose layout this is: SAELens takes a cfg.json without it for an older one, and drops the metadata
SAELENS_VERSION = "6.0.0"

# TransformerLens must change nothing, or the activations are not the ones that the heads read
UNPROCESSED = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}


class HeadFolderError(UserError):
    """A folder of heads cannot be used; the message says why."""


def check_savable(heads: Iterable[SAEHead]) -> None:
    """Check that every head has a form on disk, before anything is trained or written.

    Raises:
        HeadConfigError: naming the first that has none.
    """
    for head in heads:
        head.saelens_options()


def save_heads(
    heads: Iterable[SAEHead], checkpoint: Path, metadata: dict[str, Any] | None = None
) -> None:
    """Write every head below `checkpoint/saes/`, in place of all that were saved there before.

    Args:
        heads: heads on different sites.
        checkpoint: folder of the model's checkpoint; created if absent.
        metadata: about the model and its text, for every head: `model_name`, `context_size`, …;
            of a path only the last name is kept.
    """
    heads = list(heads)
    metadata = without_folder(metadata or {})
    # a head that has no form on disk is refused before anything is replaced
    configs = [_to_saelens(head, metadata) for head in heads]
    stale = set(saved_hook_names(checkpoint)) - {head.config.hook_name for head in heads}
    for hook_name in filter(HOOK_NAME.fullmatch, stale):
        shutil.rmtree(checkpoint / HEADS_FOLDER / hook_name)
    for head, config in zip(heads, configs, strict=True):
        folder = checkpoint / HEADS_FOLDER / head.config.hook_name
        folder.mkdir(parents=True, exist_ok=True)
        weights = head.saelens_weights()
        save_file(_on_cpu(weights), folder / WEIGHTS_FILE)
        (folder / TRAINING_FILE).unlink(missing_ok=True)  # of a head that was saved here before
        if rest := _not_held(head.state_dict(), weights):
            save_file(_on_cpu(rest), folder / TRAINING_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _not_held(state: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in weights or not torch.equal(tensor, weights[name])
    }


def saved_hook_names(checkpoint: Path) -> list[str]:
    """Names of the folders below `checkpoint/saes/`, sorted; empty when there is none."""
    folder = checkpoint / HEADS_FOLDER
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def load_head(checkpoint: Path, hook_name: str) -> SAEHead:
    """One head, as it was saved.

    Args:
        checkpoint: folder that holds `saes/`.
        hook_name: the head's site.

    Raises:
        CheckpointError: if the name is no residual-stream site.
        HeadFolderError: if a file is missing or damaged, or name and contents disagree.
    """
    check_hook_name(hook_name, checkpoint / HEADS_FOLDER)
    folder = checkpoint / HEADS_FOLDER / hook_name
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise HeadFolderError(
                f"{folder / file} is missing; a head needs {CONFIG_FILE} and {WEIGHTS_FILE}."
            )
    try:
        cfg = json.loads((folder / CONFIG_FILE).read_text())
        weights = load_file(folder / WEIGHTS_FILE)
        training = folder / TRAINING_FILE
        rest = load_file(training) if training.is_file() else {}
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HeadFolderError(f"{folder} is damaged ({error}); restore or delete it.") from error
    config = _from_saelens(cfg, folder)
    if config.hook_name != hook_name:
        raise HeadFolderError(
            f"{folder / CONFIG_FILE} says that its head sits on {config.hook_name!r}, "
            f"not on {hook_name!r}; refusing to guess which is right."
        )
    return _with_weights(config, weights, rest, folder)


def check_matches(saved: Sequence[SAEHeadConfig], wanted: Sequence[SAEHeadConfig]) -> None:
    """Check that saved heads are the ones that a configuration describes.

    Raises:
        HeadFolderError: naming the first difference.
    """
    by_name = {config.hook_name: config for config in saved}
    if missing := [w.hook_name for w in wanted if w.hook_name not in by_name]:
        raise HeadFolderError(
            f"The checkpoint has no head on {', '.join(missing)}; "
            f"it has heads on {', '.join(by_name)}."
        )
    if surplus := by_name.keys() - {w.hook_name for w in wanted}:
        raise HeadFolderError(
            f"The checkpoint has heads on {', '.join(sorted(surplus))}, "
            "which the configuration does not name."
        )
    for config in wanted:
        for name, value in vars(config).items():
            if (found := getattr(by_name[config.hook_name], name)) != value:
                raise HeadFolderError(
                    f"The checkpoint's head on {config.hook_name} has {name} = {found}, "
                    f"the configuration says {value}; change the configuration or start anew."
                )


def _to_saelens(head: SAEHead, metadata: dict[str, Any]) -> dict[str, Any]:
    config = head.config
    return {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(head.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "reshape_activations": "none",
        **head.saelens_options(),
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "hook_name": config.hook_name,
            "hook_head_index": None,
            "prepend_bos": False,
            **_skipped(config),
            "model_from_pretrained_kwargs": UNPROCESSED,
            **metadata,
            "saereg": {
                "format_version": FORMAT_VERSION,
                **{name: getattr(config, name) for name in OUR_FIELDS},
            },
        },
    }


def _skipped(config: SkipOptions) -> dict[str, Any]:
    """The same in SAELens's words, whose rows have no padding."""
    found: dict[str, Any] = {}
    if config.skip_positions:
        found["seqpos_slice"] = [config.skip_positions, None]
    if config.skip_tokens:
        found["exclude_special_tokens"] = config.skip_tokens
    return found


def _from_saelens(cfg: dict[str, Any], folder: Path) -> SAEHeadConfig:
    try:
        metadata = cfg["metadata"]
        ours = metadata["saereg"]
        if ours["format_version"] != FORMAT_VERSION:
            raise HeadFolderError(
                f"{folder / CONFIG_FILE} has format version {ours['format_version']}; this version "
                f"of hf-saereg reads version {FORMAT_VERSION}."
            )
        there = [name for name in OUR_FIELDS if name in ours or name not in LATER_FIELDS]
        options = {name: ours[name] for name in there}
        sizes = {name: cfg[name] for name in SAELENS_FIELDS}
        return SAEHeadConfig(hook_name=metadata["hook_name"], **sizes, **options)
    except (KeyError, TypeError) as error:
        raise HeadFolderError(
            f"{folder / CONFIG_FILE} lacks {error}; it was not written by hf-saereg."
        ) from error


def _with_weights(
    config: SAEHeadConfig, weights: dict[str, Tensor], rest: dict[str, Tensor], folder: Path
) -> SAEHead:
    try:
        with torch.device("meta"):  # its sizes are not to be trusted with memory yet
            head = make_head(config)
    except (HeadConfigError, TypeError) as error:
        raise HeadFolderError(
            f"{folder / CONFIG_FILE} describes no usable head: {error}"
        ) from error
    check_tensors(weights, head.saelens_weights(), folder / WEIGHTS_FILE)
    head.load_saelens_weights(weights)
    if rest:
        state = head.state_dict()
        check_tensors(rest, {k: v for k, v in state.items() if k in rest}, folder / TRAINING_FILE)
        head.load_state_dict(state | rest, assign=True)
    return head


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Check names, shapes and finiteness of what a file holds.

    Args:
        found: tensors of the file.
        expected: of the names and shapes that they must have.
        path: of the file, for the message.

    Raises:
        HeadFolderError: if something differs.
    """
    shapes, expected_shapes = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (found, expected)
    )
    if shapes != expected_shapes:
        raise HeadFolderError(
            f"{path} holds {shapes}, but {CONFIG_FILE} describes {expected_shapes}."
        )
    if broken := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise HeadFolderError(f"{path} has NaN or infinity in {broken[0]}.")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
