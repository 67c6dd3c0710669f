"""A head from a folder that SAELens wrote, for evaluation, regularization or adaptation.

Notable:
- what our families compute otherwise is folded into the weights: inputs that `b_dec` is not taken
  from, features scaled by decoder norms, activations that were scaled to a norm, a stream that
  TransformerLens had centred
- first positions and token ids that it was trained without stay left out; a slice with an end, and
  special tokens that are not listed, mean something to SAELens's own store of activations alone
- what cannot be folded exactly is refused: no head that reads its site otherwise than in SAELens
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_saereg.checkpoint import check_hook_name
from hf_saereg.heads import FAMILIES, make_head
from hf_saereg.heads.base import SAEHead, SAEHeadConfig
from hf_saereg.heads.folder import HeadFolderError, check_tensors
from hf_saereg.layout import CONFIG_FILE, WEIGHTS_FILE

SCALER_FILE = "activation_scaler.json"
ENCODER_BIASES = {"gated": ("b_gate", "b_mag")}
RAW_INPUTS = ("none", "layer_norm")


def load_saelens_head(folder: str | Path, hook_name: str | None = None, **options: Any) -> SAEHead:
    """The head that computes what `SAE.load_from_disk(folder)` computes.

    An SAE trained on TransformerLens's centred stream, as those of `gpt2-small-res-jb`, reads the
    uncentred one with the same features: see `_centred`. The folder must say so, which it does when
    SAELens saved it after `SAE.from_pretrained`; one that does not say is taken as uncentred.

    Args:
        folder: with `cfg.json` and `sae_weights.safetensors`.
        hook_name: its site, where the folder does not say or says another.
        **options: of `SAEHeadConfig`, for training on: `reconstruction_weight`, …

    Raises:
        HeadFolderError: if the folder is damaged, or its SAE is none that our families compute.
        CheckpointError: if its site is none of a residual stream.
    """
    folder = Path(folder)
    cfg, weights = _read(folder)
    hook_name = hook_name or cfg.get("metadata", {}).get("hook_name") or cfg.get("hook_name")
    check_hook_name(str(hook_name), folder)
    family = cfg.get("architecture", "standard")
    if family not in FAMILIES:
        raise HeadFolderError(
            f"{folder} holds a {family!r} SAE; only {', '.join(FAMILIES)} can be read."
        )
    scale = _scale(cfg, folder)
    weights = _as_ours(family, cfg, weights)
    config = SAEHeadConfig(
        architecture=family,
        hook_name=str(hook_name),
        d_in=cfg["d_in"],
        d_sae=cfg["d_sae"],
        k=round(cfg["k"]) if FAMILIES[family].sparsity_option == "k" else None,
        normalization="layer_norm" if cfg["normalize_activations"] == "layer_norm" else "published",
        **_skipped(cfg.get("metadata", {})) | options,
    )
    with torch.device("meta"):
        head = make_head(config)
    check_tensors(weights, head.saelens_weights(), folder / WEIGHTS_FILE)
    head.load_saelens_weights(weights)
    return (head if scale is None else head.folded(scale)).eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise HeadFolderError(
                f"{folder / file} is missing; an SAE needs {CONFIG_FILE} and {WEIGHTS_FILE}."
            )
    try:
        cfg = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
        if missing := {"d_in", "d_sae"} - cfg.keys():
            raise HeadFolderError(f"{folder / CONFIG_FILE} lacks {', '.join(sorted(missing))}.")
        if cfg.get("architecture") in ("topk", "batchtopk") and "k" not in cfg:
            raise HeadFolderError(f"{folder / CONFIG_FILE} lacks k.")
    except (SafetensorError, ValueError, AttributeError) as error:
        if isinstance(error, HeadFolderError):
            raise
        raise HeadFolderError(f"{folder} is damaged ({error}); restore or delete it.") from error
    return {"normalize_activations": "none", **cfg}, weights


def _skipped(metadata: dict[str, Any]) -> dict[str, Any]:
    match metadata.get("seqpos_slice"):
        case [int(first), None] if first >= 0:
            positions = first
        case _:
            positions = 0
    listed = metadata.get("exclude_special_tokens")
    return {
        "skip_positions": positions,
        "skip_tokens": listed if isinstance(listed, list) else [],
    }


def _scale(cfg: dict[str, Any], folder: Path) -> float | None:
    """What raw activations are to be multiplied by; None where the weights read them raw."""
    if cfg.get("reshape_activations", "none") != "none":
        raise HeadFolderError(f"{folder} holds an SAE of attention heads, not of a stream.")
    normalization = cfg["normalize_activations"]
    if normalization in RAW_INPUTS:
        return None
    if normalization == "expected_average_only_in" and (folder / SCALER_FILE).is_file():
        return json.loads((folder / SCALER_FILE).read_text())["scaling_factor"]
    raise HeadFolderError(
        f"{folder} holds an SAE of activations normalised by {normalization!r} that its weights do "
        "not contain; fold the normalisation into them in SAELens and save it again."
    )


@torch.no_grad()
def _as_ours(family: str, cfg: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `SAEHead.saelens_weights` has them, of the same features."""
    weights = dict(weights)
    biases = ENCODER_BIASES.get(family, ("b_enc",))
    if _was_centred(cfg):
        weights = _centred(cfg, weights, biases)
    if family == "batchtopk" and "topk_threshold" in weights:
        threshold = weights.pop("topk_threshold").to(weights["b_enc"])
        weights["threshold"] = threshold.expand(cfg["d_sae"]).clone()
    if "threshold" in weights:
        # a feature is positive before its threshold is asked, and ours has a logarithm
        tiny = torch.finfo(weights["threshold"].dtype).tiny
        weights["threshold"] = weights["threshold"].clamp(min=tiny)
    if cfg.get("rescale_acts_by_decoder_norm"):
        norm = weights["W_dec"].norm(dim=-1)
        weights["W_enc"] = weights["W_enc"] * norm
        weights["b_enc"] = weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    if not cfg.get("apply_b_dec_to_input", True):
        shift = weights["b_dec"] @ weights["W_enc"]
        weights = _shifted(weights, biases, shift)
    return weights


def _was_centred(cfg: dict[str, Any]) -> bool:
    processing = cfg.get("metadata", cfg).get("model_from_pretrained_kwargs") or {}
    return bool(processing.get("center_writing_weights"))


def _centred(
    cfg: dict[str, Any], weights: dict[str, Tensor], biases: Sequence[str]
) -> dict[str, Tensor]:
    """Encoder that reads x as the SAE reads P x = x − mean(x), the mean over `d_in`.

    `center_writing_weights` takes the mean from all that is written to the stream, so that there it
    is P x where here it is x. P is linear and symmetric: `W_enc` becomes P `W_enc`, whose columns
    have mean 0, and features are the same to rounding. A head that is folded once stays as it is.

    The decoder is left alone. What it gives lies on the centred stream, and mean(x) is not in it;
    every later reader of GPT-2, `ln_1`, `ln_2` and `ln_f`, begins with P. So a stream that goes on
    from x̂ and one from x̂ + mean(x) give the same logits: by induction, blocks that read the same
    P x write the same, and the two sums differ by the same multiple of (1, …, 1) after each block.
    What does see the mean: the error against x, of which mean(x) is part; an SAE further on that
    reads raw activations. One that is folded does not, while in TransformerLens it would see
    mean(x̂), which training brings close to 0.
    """
    mean = weights["W_enc"].mean(dim=0)  # (d_sae,)
    folded = weights | {"W_enc": weights["W_enc"] - mean}
    if cfg.get("apply_b_dec_to_input", True):
        # b_dec @ W_enc is subtracted there, b_dec @ P W_enc here
        folded = _shifted(folded, biases, -weights["b_dec"].sum() * mean)
    return folded


def _shifted(weights: dict[str, Tensor], biases: Sequence[str], shift: Tensor) -> dict[str, Tensor]:
    """With `shift`, (d_sae,), added to what the encoder computes from x."""
    gains = {"b_mag": weights["r_mag"].exp()} if "b_mag" in biases else {}
    return weights | {name: weights[name] + shift * gains.get(name, 1.0) for name in biases}
