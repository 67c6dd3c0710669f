"""What a sparse autoencoder is: the families by name, the losses, the files.

`family_named` and `make_head` are the registry's only doors: a new family is one new file and one
line here.
"""

from hf_saereg.heads.base import SAEHead
from hf_saereg.heads.batchtopk import BatchTopKSAE
from hf_saereg.heads.config import NORMALIZATIONS, HeadConfigError, SAEHeadConfig, SkipOptions
from hf_saereg.heads.gated import GatedSAE
from hf_saereg.heads.jumprelu import JumpReLUSAE
from hf_saereg.heads.standard import StandardSAE
from hf_saereg.heads.statistics import SAELosses, SiteStatistics
from hf_saereg.heads.topk import TopKSAE

FAMILIES: dict[str, type[SAEHead]] = {
    family.architecture: family
    for family in (StandardSAE, GatedSAE, JumpReLUSAE, TopKSAE, BatchTopKSAE)
}


def family_named(architecture: str) -> type[SAEHead]:
    """The family of that name.

    Raises:
        HeadConfigError: if there is none.
    """
    if architecture not in FAMILIES:
        raise HeadConfigError(
            f"Unknown architecture {architecture!r}; choose one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[architecture]


def make_head(config: SAEHeadConfig) -> SAEHead:
    """A freshly initialised head.

    Args:
        config: shape, place and sparsity.

    Raises:
        HeadConfigError: if the architecture is unknown or its own options are wrong.
    """
    return family_named(config.architecture)(config)


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
    "SkipOptions",
    "StandardSAE",
    "TopKSAE",
    "family_named",
    "make_head",
]
