"""Heads that start from trained ones: of a previous run, of the Hub, or from SAELens.

Notable:
- what a head computes, and on which tokens, comes from where it was trained, how it is trained on
  from the options
- a difference between the two that would change its features is refused
- the stream after a block is that before the next: SAELens's folders may call it by either name
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from hf_saereg.checkpoint import find_heads
from hf_saereg.heads import make_head
from hf_saereg.heads.base import HeadConfigError, SAEHead, SAEHeadConfig
from hf_saereg.heads.folder import HeadFolderError, load_head, saved_hook_names
from hf_saereg.heads.saelens import load_saelens_head
from hf_saereg.layout import CONFIG_FILE


def start_heads(source: str | Path, configs: Sequence[SAEHeadConfig]) -> list[SAEHead]:
    """Heads as configured, with the weights of trained ones; nothing is counted or steered yet.

    Args:
        source: a checkpoint's folder or repository, with `saes/`; one SAE's folder as SAELens
            writes it; or a folder of these.
        configs: one a site.

    Raises:
        HeadFolderError: if a site has no trained head there, or one is damaged.
        HeadConfigError: if a head was trained as another than is configured.
    """
    trained = {head.config.hook_name: head for head in _trained(source, configs)}
    heads = []
    for config in configs:
        there = trained.get(config.hook_name) or trained.get(_after_previous(config.hook_name))
        if there is None:
            raise HeadFolderError(
                f"{source} has no head on {config.hook_name}, but on "
                f"{', '.join(trained) or 'no site'}; name the sites that it has by hook_names."
            )
        heads.append(_started(config, there, source))
    return heads


def _after_previous(hook_name: str) -> str | None:
    """What the place before a block is called as the one after the previous block."""
    _, block, point = hook_name.split(".")
    if point != "hook_resid_pre" or block == "0":
        return None
    return f"blocks.{int(block) - 1}.hook_resid_post"


def _trained(source: str | Path, configs: Sequence[SAEHeadConfig]) -> Iterator[SAEHead]:
    folder = Path(source)
    if (folder / CONFIG_FILE).is_file():
        yield load_saelens_head(folder)
    elif folder.is_dir() and not saved_hook_names(folder):
        for path in sorted(folder.glob(f"*/{CONFIG_FILE}")):
            yield load_saelens_head(path.parent)
    else:
        wanted = [config.hook_name for config in configs]
        folder = find_heads(source, hook_names=wanted)
        for hook_name in set(saved_hook_names(folder)) & set(wanted):
            yield load_head(folder, hook_name)


def _started(config: SAEHeadConfig, trained: SAEHead, source: str | Path) -> SAEHead:
    for name in ("architecture", "d_in", "d_sae", "k"):
        found, wanted = getattr(trained.config, name), getattr(config, name)
        if found != wanted:
            raise HeadConfigError(
                f"The head on {config.hook_name} in {source} has {name} {found}, the options say "
                f"{wanted}; say {name}: {found}."
            )
    if config.tied and not trained.config.tied:
        raise HeadConfigError(
            f"The head on {config.hook_name} in {source} is not tied; leave tied out."
        )
    reads = [c.normalization == "layer_norm" for c in (trained.config, config)]
    if reads[0] != reads[1]:
        raise HeadConfigError(
            f"The head on {config.hook_name} in {source} was trained with normalization "
            f"{trained.config.normalization}; it must be layer_norm for both or for neither."
        )
    scaled = config.normalization == "variance"
    if scaled and trained.config.normalization != "variance":
        raise HeadConfigError(
            f"The head on {config.hook_name} in {source} reads raw activations, and does not know "
            "the spread that normalization variance divides them by; say normalization: "
            f"{trained.config.normalization}."
        )
    skip = config.for_trained(trained.config, source)
    head = make_head(replace(config, **asdict(skip)))
    head.load_saelens_weights(trained.saelens_weights())
    if scaled:
        head.load_scaled_weights(trained)
    return head
