"""LoRA adapters inside a model: put in, switched off, merged into its weights.

Notable:
- adapters are injected in place, so the model keeps its class, its sites and its heads; what is
  saved is PEFT's own folder, which `PeftModel.from_pretrained` puts on a stock GPT-2
- token embeddings never take one: GPT-2's are its unembedding too, and merged they would no longer
  be one tensor
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_saereg.errors import UserError

TARGETS = ("c_attn", "c_proj", "c_fc")  # every matrix of a block


class AdapterError(UserError):
    """Adapters cannot be used in this way; the message says why."""


def lora_config(
    rank: int = 64, alpha: int = 32, dropout: float = 0.1, targets: Sequence[str] = TARGETS
) -> LoraConfig:
    """PEFT's configuration of an adapter, with the defaults of arXiv 2501.19406.

    Args:
        rank: of the update of each matrix.
        alpha: the update is scaled by alpha / rank.
        dropout: of what the adapter reads, from 0 to below 1.
        targets: which matrices of a block have one.

    Raises:
        AdapterError: if a number or a name cannot be.
    """
    if rank < 1 or alpha < 1:
        raise AdapterError(f"lora_r is {rank} and lora_alpha {alpha}; both must be at least 1.")
    if not 0 <= dropout < 1:
        raise AdapterError(f"lora_dropout is {dropout}; it must be from 0 to below 1.")
    if not targets or set(targets) - set(TARGETS):
        raise AdapterError(
            f"lora_targets is {list(targets)}; choose among {', '.join(TARGETS)}. Embeddings are "
            "tied to the output layer and take no adapter."
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        fan_in_fan_out=True,  # GPT-2 keeps its matrices transposed
        task_type="CAUSAL_LM",
    )


class Adapted:
    """What a `PreTrainedModel` with PEFT's adapters in it can do beyond `transformers`."""

    @property
    def has_adapters(self) -> bool:
        """Whether there is one, switched on or off."""
        return self._hf_peft_config_loaded

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base model inside."""
        if not self.has_adapters:
            yield
            return
        layers = self._adapted_layers()
        trained = [[p.requires_grad for p in layer.parameters()] for layer in layers]
        self.disable_adapters()
        try:
            yield
        finally:
            self.enable_adapters()
            for layer, flags in zip(layers, trained, strict=True):
                for parameter, flag in zip(layer.parameters(), flags, strict=True):
                    parameter.requires_grad_(flag)

    def merge_and_unload(self) -> None:
        """Add the active adapters' updates to the weights, and take all adapters out.

        What is left is a model like any other, with the heads that it had; all its language-model
        weights can be trained again.

        Raises:
            AdapterError: if there is no adapter, or the merged weights are not finite.
        """
        if not self.has_adapters:
            raise AdapterError("This model has no adapter to merge; load or train one first.")
        adapted = self._adapted_layers()
        try:
            for layer in adapted:
                layer.merge(safe_merge=True)
        except ValueError as error:
            for layer in adapted:
                if layer.merged:
                    layer.unmerge()
            raise AdapterError(f"The adapter cannot be merged: {error}") from error
        for parent in [*self.modules()]:
            for name, child in parent.named_children():
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
        del self.peft_config
        self._hf_peft_config_loaded = False
        self.base_model.requires_grad_(True)

    def _adapted_layers(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
