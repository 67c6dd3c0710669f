"""The model that a training started from: what it would have predicted.

Notable:
- where adapters are trained it is the model with these switched off, and costs no memory; otherwise
  a frozen copy of the language model
- its predictions are those of evaluation: without dropout
"""

import copy
from typing import Any

import torch
from torch import Tensor

from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.positions import language_inputs


class Reference:
    """Predictions of a model as it is now, whatever becomes of it.

    Args:
        model: before its training; with adapters these may be trained already.
    """

    def __init__(self, model: SAERegGPT2LMHeadModel) -> None:
        self._adapted = model if model.has_adapters else None
        self._copy = None
        if self._adapted is None:
            self._copy = copy.deepcopy(model.plain_view()).requires_grad_(False).eval()

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """(batch, sequence, vocabulary).

        Args:
            inputs: `input_ids`, and `attention_mask` and `position_ids` where there are some.
        """
        known = language_inputs(inputs)
        if self._copy is not None:
            self._copy.to(known["input_ids"].device)
            return self._copy(**known, use_cache=False).logits
        model = self._adapted
        training = model.training
        model.eval()
        try:
            with model.without_adapters():
                return model(**known, compute_term=False, use_cache=False).logits
        finally:
            model.train(training)
