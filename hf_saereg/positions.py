"""Where the tokens of a padded batch stand, so that a row may be padded on either side.

Notable:
- GPT-2 itself counts positions from the first column, padding too: on the left this moves the text
- a batch that has positions keeps them
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LANGUAGE_INPUTS = ("input_ids", "attention_mask", "position_ids")


def with_positions(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, with `position_ids` counted over real tokens where it has a mask and none.

    Args:
        inputs: of a language model; `attention_mask` (batch, sequence) where there is padding.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or inputs.get("position_ids") is not None:
        return dict(inputs)
    return {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def language_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """What the language model predicts from, and nothing else of the batch.

    Args:
        inputs: of a language model.
    """
    return {name: inputs.get(name) for name in LANGUAGE_INPUTS}
