"""What a sparse autoencoder is: the families by name, the losses, the files.

`make_head(config)` is the registry's only door: a new family is one new file and one line here.
"""

from hf_saereg.heads.base import SAEHead
from hf_saereg.heads.batchtopk import BatchTopKSAE
from hf_saereg.heads.config import NORMALIZATIONS, HeadConfigError, SAEHeadConfig
from hf_saereg.heads.gated import GatedSAE
from hf_saereg.heads.jumprelu import JumpReLUSAE
from hf_saereg.heads.standard import StandardSAE
from hf_saereg.heads.statistics import SAELosses, SiteStatistics
from hf_saereg.heads.topk import TopKSAE

FAMILIES: dict[str, type[SAEHead]] = {
    family.architecture: family
    for family in (StandardSAE, GatedSAE, JumpReLUSAE, TopKSAE, BatchTopKSAE)
}


def make_head(config: SAEHeadConfig) -> SAEHead:
    """A freshly initialised head.

    Args:
        config: shape, place and sparsity.

    Raises:
        HeadConfigError: if the architecture is unknown or its own options are wrong.
    """
    if config.architecture not in FAMILIES:
        raise HeadConfigError(
            f"Unknown architecture {config.architecture!r}; choose one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.architecture](config)


__all__ = [
    "FAMILIES",
    "NORMALIZATIONS",
    "BatchTopKSAE",
    "GatedSAE",
    "HeadConfigError",
    "JumpReLUSAE",
    "SAEHead",
    "SAEHeadConfig",
    "SAELosses",
    "SiteStatistics",
    "StandardSAE",
    "TopKSAE",
    "make_head",
]
