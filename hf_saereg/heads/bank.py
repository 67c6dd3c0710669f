"""The heads of one model, by hook name."""

from collections.abc import Iterable, Iterator
from typing import Self

import torch
from torch import Tensor, nn

from hf_saereg.heads.base import HeadConfigError, SAEHead, SAEHeadConfig


class HeadBank(nn.Module):
    """Heads by hook name, in the order in which the residual stream passes them.

    `nn.ModuleDict` cannot hold hook names, because its keys may not contain a dot.

    Args:
        heads: in stream order.

    Raises:
        HeadConfigError: if two heads sit on one site.
    """

    def __init__(self, heads: Iterable[SAEHead] = ()) -> None:
        super().__init__()
        self._module_names: dict[str, str] = {}
        self.frozen = False
        for head in heads:
            hook_name = head.config.hook_name
            if hook_name in self._module_names:
                raise HeadConfigError(f"Two heads sit on {hook_name}; give each site one head.")
            self._module_names[hook_name] = hook_name.replace(".", "_")
            self.add_module(self._module_names[hook_name], head)

    def freeze(self) -> None:
        """Train no head from here on: all stay as they are, and in evaluation mode."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, unless the heads are frozen."""
        return super().train(mode and not self.frozen)

    def with_state(self, state: dict[str, Tensor]) -> "HeadBank":
        """Heads like these with other weights, such as those gathered from shards.

        Args:
            state: as `state_dict` of these heads returns it.
        """
        with torch.device("meta"):
            bank = HeadBank(type(head)(head.config) for head in self)
        bank.load_state_dict(state, assign=True)
        return bank

    def __getitem__(self, hook_name: str) -> SAEHead:
        return getattr(self, self._module_names[hook_name])

    def __iter__(self) -> Iterator[SAEHead]:
        return (self[hook_name] for hook_name in self._module_names)

    def __len__(self) -> int:
        return len(self._module_names)

    @property
    def hook_names(self) -> list[str]:
        """Sites that have a head."""
        return list(self._module_names)

    @property
    def configs(self) -> list[SAEHeadConfig]:
        """Configuration of each head."""
        return [head.config for head in self]
