"""Fidelity as an `evaluate.Metric`: add batches of text, compute with a model and its heads.

    metric = FidelityMetric()
    for batch in loader:
        metric.add_batch(**batch)
    figures = metric.compute(model=model, heads=model.heads)

Notable:
- a local subclass: nothing is fetched from a hub
- rows of different lengths are padded on the right, out of the heads' sight
- with `num_process` and `process_id` the rows of several processes are gathered by `evaluate`, and
  the first process computes; to share the forward passes too, call `hf_saereg.fidelity` itself
"""

from collections.abc import Sequence
from typing import Any

import evaluate
import torch
from datasets import Features, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_saereg.fidelity import Batch, baselines, fidelity
from hf_saereg.heads.bank import HeadBank
from hf_saereg.modeling import SAERegGPT2LMHeadModel

DESCRIPTION = """
How well the sparse autoencoders on a language model's sites stand in for its activations: L0, FVU,
dead latents, CE increase, CE recovered, KL of the original to the spliced distribution; each head
alone, and all together.
"""
INPUTS = """
Args:
    input_ids: rows of token ids.
    labels: rows of the same lengths, -100 where nothing is to be predicted; shifted inside.
    attention_mask: rows of the same lengths, 0 at padding; all ones by default.
    model: a `SAERegGPT2LMHeadModel`.
    heads: a `HeadBank` on some of its sites; the model's own by default.
    batch_size: rows in a forward pass.
"""
FILLER = {"input_ids": 0, "labels": -100, "attention_mask": 0}


class FidelityMetric(evaluate.Metric):
    """Scores heads on all the text that was added."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=Features({name: List(Value("int64")) for name in FILLER}),
        )

    def add_batch(
        self,
        *,
        input_ids: Sequence[Sequence[int]] | Tensor,
        labels: Sequence[Sequence[int]] | Tensor,
        attention_mask: Sequence[Sequence[int]] | Tensor | None = None,
    ) -> None:
        """Add rows, (batch, sequence) or lists of different lengths."""
        if attention_mask is None:
            attention_mask = [[1] * len(row) for row in input_ids]
        # by name, because `evaluate` copies this method, and a copy has no cell for super()
        evaluate.Metric.add_batch(
            self, input_ids=input_ids, labels=labels, attention_mask=attention_mask
        )

    def _compute(
        self,
        input_ids: list[list[int]],
        labels: list[list[int]],
        attention_mask: list[list[int]],
        model: SAERegGPT2LMHeadModel,
        heads: HeadBank | None = None,
        batch_size: int = 32,
    ) -> dict[str, float]:
        columns = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        batches = [
            _padded({name: rows[i : i + batch_size] for name, rows in columns.items()})
            for i in range(0, len(input_ids), batch_size)
        ]
        was_training = model.training
        model.eval()
        try:
            base = baselines(model, batches)
            bank = model.heads if heads is None else heads
            return fidelity(model, bank, batches, base).figures()
        finally:
            model.train(was_training)


def _padded(columns: dict[str, list[Any]]) -> Batch:
    return {
        name: pad_sequence([torch.tensor(row) for row in rows], True, FILLER[name])
        for name, rows in columns.items()
    }
