"""GPT-2 whose residual stream can be read and replaced at named sites; no heads yet.

Notable:
- sites are read and patched by hooks before each block and before `ln_f`, under one context
  manager; `hidden_states[-1]` is after `ln_f` and never used
- hook names are TransformerLens's
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from hf_saereg.configuration import gpt2_hook_names

# (batch, sequence, d_in) → what the stream continues with; None leaves it as it is
SiteFunction = Callable[[Tensor], Tensor | None]


class SitedGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 with a site before every block and one after the last."""

    @property
    def hook_names(self) -> list[str]:
        """All sites of this model, in stream order, with or without a head."""
        return gpt2_hook_names(self.config.n_layer)

    @contextmanager
    def at_sites(self, functions: dict[str, SiteFunction]) -> Iterator[None]:
        """Call a function on the activations at each named site, in every forward pass inside.

        Args:
            functions: by hook name; what a function returns replaces the activations from there on.

        Raises:
            KeyError: if a hook name is not one of `hook_names`.
        """
        modules = dict(
            zip(self.hook_names, [*self.transformer.h, self.transformer.ln_f], strict=True)
        )
        # all names are looked up before a hook is set, so that a wrong one leaves none behind
        targets = [(modules[hook_name], function) for hook_name, function in functions.items()]
        handles = [
            module.register_forward_pre_hook(_on_first_argument(function))
            for module, function in targets
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reading(self, hook_names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Collect the activations at the named sites.

        Args:
            hook_names: which sites.

        Yields:
            A dictionary that each forward pass inside fills: (batch, sequence, d_in) by hook name.
        """
        activations: dict[str, Tensor] = {}
        # dict.update returns None, so the stream goes on as it is
        functions = {
            hook_name: lambda x, hook_name=hook_name: activations.update({hook_name: x})
            for hook_name in hook_names
        }
        with self.at_sites(functions):
            yield activations

    def plain_view(self) -> GPT2LMHeadModel:
        """The language model alone, as stock GPT-2 that shares this one's parameters."""
        with torch.device("meta"):
            view = GPT2LMHeadModel(self.config)
        view.transformer, view.lm_head = self.transformer, self.lm_head
        view.generation_config = self.generation_config
        return view.train(self.training)


def _on_first_argument(function: SiteFunction) -> Callable[[nn.Module, tuple], tuple | None]:
    def pre_hook(_module: nn.Module, args: tuple) -> tuple | None:
        replacement = function(args[0])
        return None if replacement is None else (replacement, *args[1:])

    return pre_hook
