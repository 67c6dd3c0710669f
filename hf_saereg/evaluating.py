"""A `Trainer` that evaluates: CE on every row once, the term, the base, heads spliced in.

Notable:
- the evaluation loss is plain CE; `eval_objective` is CE + term, or with frozen heads the spliced
  CE or KL that adapters are trained on, for those who select by it; with `eval_fidelity` the heads
  are scored spliced into the model, too
- rows that are there only to give every process equally many are left out of every sum
- what a model is held close to, and heads that are spliced in, are the same in training: they are
  made here
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import EvalLoopOutput

from hf_saereg.divergence import kl_of_predictions
from hf_saereg.errors import UserError
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.meter import TermMeter
from hf_saereg.modeling import SAERegOutput
from hf_saereg.recording import RecordingTrainer
from hf_saereg.reference import Reference
from hf_saereg.refusals import check_training
from hf_saereg.splicing import Splice


class EvaluatingTrainer(RecordingTrainer):
    """Evaluates a `SAERegGPT2LMHeadModel` on CE, its term, its base and its frozen heads.

    Args:
        *args: as `Trainer` takes them.
        **kwargs: as `Trainer` and `RecordingTrainer` take them.

    Raises:
        UserError: as `check_training`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_training(self.args, self.model, self.is_fsdp_enabled)
        self._eval_meter = TermMeter()
        # over predicted tokens: CE, their number, CE of the base, KL(base ‖ model), spliced loss
        self._eval_sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        self._splices = self._new_splices()
        self._ce_weight, self._kl_weight = 1.0, self.args.anchor_weight
        if self._splices and self.model.term.splice_loss == "kl":
            self._ce_weight, self._kl_weight = 0.0, 1.0
        self.reference = None
        if self._kl_weight or self.args.eval_base:
            self.reference = Reference(self.model)

    def _new_splices(self) -> dict[str, Splice]:
        """The heads in the place of their sites, where they are frozen."""
        heads = self.model.heads if self.model.heads.frozen else []
        return {head.config.hook_name: Splice(head) for head in heads}

    def _reference_logits(self, inputs: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            return self.reference.logits(inputs)

    def _count_real_rows(
        self, model: nn.Module, ce: Tensor, output: SAERegOutput, inputs: dict[str, Any]
    ) -> None:
        """Leave out the rows that are there only to give every process equally many.

        A model that is sharded runs on all processes or on none: so do all forward passes here.
        """
        last = self.accelerator.gradient_state
        if self.args.world_size == 1 or not last.end_of_dataloader or last.remainder <= 0:
            self._count_evaluation(model, ce, output, inputs)
            return
        rows = len(inputs["labels"])
        real = min(max(last.remainder - self.args.process_index * rows, 0), rows)
        inputs = {name: tensor[: max(real, 1)] for name, tensor in inputs.items()}
        output = model(**inputs)
        self._count_evaluation(model, output.loss, output, inputs, has_rows=real > 0)

    def _count_evaluation(
        self,
        model: nn.Module,
        ce: Tensor,
        output: SAERegOutput,
        inputs: dict[str, Any],
        has_rows: bool = True,
    ) -> None:
        labels = inputs["labels"]
        predicted = (labels[:, 1:] != -100).sum() * has_rows
        base_ce = kl = spliced = torch.zeros_like(ce)
        base = None
        if self.reference is not None:
            base = self._reference_logits(inputs)
            base_ce = self.model.loss_function(base, labels, self.model.config.vocab_size)
            kl = kl_of_predictions(base, output.logits, labels)
        if self._splices:
            spliced = self._spliced_loss(model, inputs, base)
        means = torch.stack([ce.detach(), torch.ones_like(ce), base_ce, kl, spliced])
        self._eval_sums += means * predicted
        if output.term is not None:
            self._eval_meter.update(output.sites, counts=has_rows)

    def _spliced_loss(
        self, model: nn.Module, inputs: dict[str, Any], base: Tensor | None
    ) -> Tensor:
        """CE or KL with the frozen heads in place, as adapters are trained on, in evaluation."""
        splices, mask = self._new_splices(), self.model.token_mask(inputs)
        for splice in splices.values():
            splice.mask = mask
        with self.model.at_sites(splices):
            output = model(**inputs, compute_term=False)
        if self._ce_weight:
            return output.loss
        return kl_of_predictions(base, output.logits, inputs["labels"])

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Add the term's figures, CE + term as `objective`, and fidelity, to the metrics.

        `loss` becomes the mean over predicted tokens, whatever the lengths of rows and batches.
        """
        self._eval_sums.zero_()
        output = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        figures = self._eval_meter.read(self.accelerator)
        if self.args.eval_fidelity and self.model.heads:
            figures |= self._fidelity(dataloader)
        ce, predicted, base_ce, kl, spliced = self.accelerator.reduce(self._eval_sums).tolist()
        if predicted == 0:
            raise UserError(
                "The evaluation read no token that is predicted; give eval_dataset at least one "
                "row."
            )
        figures["loss"] = ce / predicted
        if self.reference is not None:
            figures |= {"base_loss": base_ce / predicted, "kl_to_base": kl / predicted}
        figures["objective"] = figures["loss"] + figures.get("term", 0.0)
        if self._splices:
            figures["objective"] = figures["spliced_loss"] = spliced / predicted
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in figures.items()})
        return output

    def _fidelity(self, dataloader: DataLoader) -> dict[str, float]:
        if isinstance(dataloader.dataset, IterableDataset):
            raise UserError(
                "eval_fidelity needs an eval_dataset with a length: a stream cannot be read twice."
            )
        # not the prepared loader, which repeats rows to give every process equally many
        batches = DataLoader(
            dataloader.dataset, self.args.eval_batch_size, collate_fn=dataloader.collate_fn
        )
        with self.compute_loss_context_manager():
            base = baselines(self.model, batches, self.accelerator)
            scores = fidelity(self.model, self.model.heads, batches, base, self.accelerator)
        return scores.figures()
