"""Heads on disk: `saes/<hook_name>/cfg.json` + `sae_weights.safetensors`, SAELens's own layout.

Notable:
- SAELens loads each folder as it is; what only we need sits in `metadata.saereg`
- what comes from a downloaded folder is checked before it is used: hook names are the two forms
  that a residual stream has, so none can leave the folder; weights are tensors only, never a pickle
- the root of a checkpoint knows nothing of heads: deleting `saes/` discards them
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_saereg.errors import UserError
from hf_saereg.heads import make_head
from hf_saereg.heads.base import HeadConfigError, SAEHead, SAEHeadConfig

HEADS_FOLDER = "saes"
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
FORMAT_VERSION = 1
HOOK_NAME = re.compile(r"blocks\.\d+\.hook_resid_(pre|post)")

# TransformerLens must change nothing, or the activations are not the ones that the heads read
UNPROCESSED = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}


class HeadFolderError(UserError):
    """A folder of heads cannot be used; the message says why."""


def save_heads(
    heads: Iterable[SAEHead], checkpoint: Path, metadata: dict[str, Any] | None = None
) -> None:
    """Write every head below `checkpoint/saes/`.

    Args:
        heads: heads on different sites.
        checkpoint: folder of the model's checkpoint; created if absent.
        metadata: about the model and its text, for every head: `model_name`, `context_size`, …
    """
    for head in heads:
        folder = checkpoint / HEADS_FOLDER / head.config.hook_name
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous().cpu() for name, tensor in head.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(_to_saelens(head, metadata or {}), indent=2))


def saved_hook_names(checkpoint: Path) -> list[str]:
    """Names of the folders below `checkpoint/saes/`, sorted; empty when there is none."""
    folder = checkpoint / HEADS_FOLDER
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def load_head(checkpoint: Path, hook_name: str) -> SAEHead:
    """One head, as it was saved.

    Args:
        checkpoint: folder that holds `saes/`.
        hook_name: the head's site.

    Raises:
        HeadFolderError: if the name is no residual-stream site, a file is missing or damaged, or
            name and contents disagree.
    """
    if not HOOK_NAME.fullmatch(hook_name):
        raise HeadFolderError(
            f"{hook_name!r} in {checkpoint / HEADS_FOLDER} is no hook name of a residual stream "
            "(blocks.N.hook_resid_pre or blocks.N.hook_resid_post); refusing to load it."
        )
    folder = checkpoint / HEADS_FOLDER / hook_name
    try:
        cfg = json.loads((folder / CONFIG_FILE).read_text())
        weights = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise HeadFolderError(
            f"{error.filename} is missing; a head needs {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from error
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HeadFolderError(f"{folder} is damaged ({error}); restore or delete it.") from error
    config = _from_saelens(cfg, folder)
    if config.hook_name != hook_name:
        raise HeadFolderError(
            f"{folder / CONFIG_FILE} says that its head sits on {config.hook_name!r}, "
            f"not on {hook_name!r}; refusing to guess which is right."
        )
    return _with_weights(config, weights, folder)


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
        "dtype": str(head.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **head.saelens_options(),
        "metadata": {
            "hook_name": config.hook_name,
            "hook_head_index": None,
            "prepend_bos": False,
            "model_from_pretrained_kwargs": UNPROCESSED,
            **metadata,
            "saereg": {
                "format_version": FORMAT_VERSION,
                "sparsity_coefficient": config.sparsity_coefficient,
                "reconstruction_weight": config.reconstruction_weight,
            },
        },
    }


def _from_saelens(cfg: dict[str, Any], folder: Path) -> SAEHeadConfig:
    try:
        metadata = cfg["metadata"]
        ours = metadata["saereg"]
        if ours["format_version"] != FORMAT_VERSION:
            raise HeadFolderError(
                f"{folder / CONFIG_FILE} has format version {ours['format_version']}; this version "
                f"of hf-saereg reads version {FORMAT_VERSION}."
            )
        return SAEHeadConfig(
            architecture=cfg["architecture"],
            hook_name=metadata["hook_name"],
            d_in=cfg["d_in"],
            d_sae=cfg["d_sae"],
            k=cfg.get("k"),
            sparsity_coefficient=ours["sparsity_coefficient"],
            reconstruction_weight=ours["reconstruction_weight"],
        )
    except (KeyError, TypeError) as error:
        raise HeadFolderError(
            f"{folder / CONFIG_FILE} lacks {error}; it was not written by hf-saereg."
        ) from error


def _with_weights(config: SAEHeadConfig, weights: dict[str, torch.Tensor], folder: Path) -> SAEHead:
    try:
        head = make_head(config)
    except HeadConfigError as error:
        raise HeadFolderError(
            f"{folder / CONFIG_FILE} describes no usable head: {error}"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        raise HeadFolderError(
            f"{folder / WEIGHTS_FILE} holds {found}, but {CONFIG_FILE} describes {expected}."
        )
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise HeadFolderError(f"{folder / WEIGHTS_FILE} has NaN or infinity in {broken[0]}.")
    head.to(weights["W_enc"].dtype).load_state_dict(weights)
    return head
