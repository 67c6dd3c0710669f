"""Train Hugging Face language models whose activations decompose into sparse features."""

from importlib import import_module
from typing import Any

_MODULES = {
    "AdaptationArguments": "adaptation",
    "CorpusArguments": "corpora",
    "FidelityMetric": "metric",
    "FreshHeadsArguments": "grid",
    "HeadBank": "heads.bank",
    "HeadsArguments": "configuration",
    "SAEHead": "heads",
    "SAEHeadConfig": "heads",
    "SAERegArguments": "trainer",
    "SAERegGPT2LMHeadModel": "modeling",
    "SAERegOutput": "modeling",
    "SAERegTrainer": "trainer",
    "SkipOptions": "heads",
    "adapt": "adaptation",
    "character_tokenizer": "corpora",
    "load_blocks": "corpora",
    "load_saelens_head": "heads.saelens",
    "make_head": "heads",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
