"""`Trainer` with the regularization term: CE + term in `compute_loss`, everything else native.

Notable:
- under gradient accumulation and data parallelism each micro-batch's term weighs as its share of
  the tokens, as CE does: what is a mean over tokens matches one large batch exactly, and the ratio
  R / ‖X‖ of the published term is taken per micro-batch and process
- weight decay touches language-model tensors of two or more dimensions, nothing of the heads
- without heads ‖x‖ a site is read on the steps that are logged, as heads tell it on every step
- frozen heads are not regularized with: their reconstructions take the place of the activations
  while the model trains, in the backward pass too, which may compute the blocks again
- with `anchor_weight` the loss has KL(base ‖ model) on the plain path, with `eval_base` evaluations
  measure it; the base is the model as it was given, without adapters
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, has_length

from hf_saereg.divergence import kl_of_predictions
from hf_saereg.errors import UserError
from hf_saereg.evaluating import EvaluatingTrainer
from hf_saereg.meter import NormMeter, TermMeter
from hf_saereg.modeling import SAERegOutput
from hf_saereg.positions import with_positions
from hf_saereg.progress import ReadablePrinter, ReadableProgress
from hf_saereg.training_arguments import SAERegArguments
from hf_saereg.upkeep import HeadUpkeep


class NonFiniteLossError(UserError):
    """CE, the term or the gradient became NaN or infinite; the message names the step."""


class SAERegTrainer(EvaluatingTrainer):
    """Trains a `SAERegGPT2LMHeadModel` on CE + term; without heads, on CE alone.

    Args:
        *args: as `Trainer` takes them.
        **kwargs: as `Trainer` and `RecordingTrainer` take them.

    Raises:
        UserError: as `check_training`, or if the training rows are no batch.
    """

    # compute_loss divides by the whole accumulated batch itself
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if has_length(self.train_dataset):
            self.args.check_train_rows(len(self.train_dataset))
        self._tokens_in_batch: Tensor | None = None
        self._train_meter, self._norm_meter = TermMeter(), NormMeter()
        # of the steps since the last log: CE and, weighted or not, KL(base ‖ model)
        self._step_sums, self._steps = torch.zeros(2, device=self.args.device), 0
        for head in self.model.heads:
            head.kernel = self.args.kernel
        self._micro_batch = 0  # since the last optimizer step
        self._upkeep = HeadUpkeep(self)
        if self.model.heads and not self._splices:
            self.add_callback(self._upkeep)
        for theirs, ours in (
            (ProgressCallback, ReadableProgress),
            (PrinterCallback, ReadablePrinter),
        ):
            if self.pop_callback(theirs):
                self.add_callback(ours())

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer` does, with DDP told of heads that a step leaves out, and exact FSDP sums."""
        if self.args.ddp_find_unused_parameters is None and self.model.term.sites_per_step:
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = plugin and plugin.mixed_precision_policy
        if isinstance(policy, MixedPrecisionPolicy):
            # what leaves the model are losses and sums over tokens: neither may be rounded
            policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)
            plugin.mixed_precision_policy = policy

    # ---- loss ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As `Trainer` does, with positions counted over real tokens: padding may be left."""
        return with_positions(super()._prepare_inputs(inputs))

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As `Trainer.training_step`, with frozen heads in place until the gradients are there."""
        inputs = self._prepare_inputs(inputs)
        if self._kl_weight:
            inputs = {**inputs, "reference_logits": self._reference_logits(inputs)}
        mask = self.model.token_mask(inputs) if self._splices else None
        for splice in self._splices.values():
            splice.mask = mask
        with self.model.at_sites(self._splices), self._reading_norms(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def _reading_norms(self, inputs: dict[str, Any]) -> AbstractContextManager:
        """On steps that are logged, where there are no heads to tell the norms."""
        step, interval = self.state.global_step + 1, self.state.logging_steps
        is_first = step == 1 and self.args.logging_first_step
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS
        if self.model.heads or not (is_first or (by_steps and step % interval == 0)):
            return nullcontext()
        return self._norm_meter.reading(self.model, self.model.token_mask(inputs))

    def get_batch_samples(
        self,
        epoch_iterator: Any,
        num_batches: int,
        device: torch.device,
    ) -> tuple[list, Tensor | int | None]:
        """Also count the tokens that the heads will read in the accumulated batch."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(map(self.model.token_count, samples)), device=device)
        # where there is none, every micro-batch's term is 0
        self._tokens_in_batch = self.accelerator.reduce(tokens).clamp(min=1)
        self._steps += 1
        self._micro_batch = 0
        return samples, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, SAERegOutput]:
        """CE + term while training, CE alone in evaluation.

        Raises:
            NonFiniteLossError: if CE or the term is NaN or infinite.
        """
        inputs = dict(inputs)
        reference = inputs.pop("reference_logits", None)
        if model.training and self.model.heads:
            inputs |= {"compute_term": False} if self._splices else self._term_inputs()
        # in evaluation the mean over this process's own tokens, whose number is known here
        number = num_items_in_batch if model.training else None
        if self.is_fsdp_enabled and number is not None:
            number = int(number)  # FSDP rounds tensors on their way into the model
        ce, output = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=number
        )
        self._check_finite(ce, output)
        if model.training:
            loss = self._training_loss(ce, output, inputs, reference, num_items_in_batch)
        else:
            loss = ce
            self._count_real_rows(model, ce, output, inputs)
        return (loss, output) if return_outputs else loss

    def _training_loss(
        self,
        ce: Tensor,
        output: SAERegOutput,
        inputs: dict[str, Any],
        reference: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        # DDP averages gradients over processes, hence the factor; CE carries it already
        processes = self.accelerator.num_processes
        averaged = num_items_in_batch is not None and self.args.average_tokens_across_devices
        factor = processes if averaged else 1
        loss, kl = self._ce_weight * ce, torch.zeros_like(ce)
        if reference is not None:
            kl = kl_of_predictions(reference, output.logits, inputs["labels"], num_items_in_batch)
            kl = kl * factor
            loss = loss + self._kl_weight * kl
        self._step_sums += torch.stack([ce.detach(), kl.detach()])
        if output.term is not None:
            self._train_meter.update(output.sites)
            self._upkeep.remember(inputs, output.sites)
            tokens = self.model.token_count(inputs)
            term = output.term * tokens * processes / self._tokens_in_batch
            if output.spliced_loss is not None:
                term = term + factor * self.model.term.splice_weight * output.spliced_loss
            loss = loss + self.model.term.warmup_factor(self.state.global_step) * term
        return loss

    def _term_inputs(self) -> dict[str, int]:
        """What the random choices of a micro-batch depend on: a resumed run makes them again."""
        draw = self._micro_batch * self.args.world_size + self.args.process_index
        self._micro_batch += 1
        return {"term_step": self.state.global_step, "term_draw": draw}

    def _check_finite(self, ce: Tensor, output: SAERegOutput) -> None:
        parts = (ce, output.term, output.spliced_loss)
        if all(part is None or part.isfinite() for part in parts):
            return
        broken = [] if ce.isfinite() else [f"the cross-entropy is {ce.item()}"]
        if output.spliced_loss is not None and not output.spliced_loss.isfinite():
            broken.append(f"the spliced loss is {output.spliced_loss.item()}")
        for hook_name, site in (output.sites or {}).items():
            if not site.value.isfinite():
                broken.append(f"the term at {hook_name} is {site.value.item()}")
        step = self.state.global_step + self.model.training
        raise NonFiniteLossError(
            f"At step {step} {' and '.join(broken)}; start anew in another output_dir, "
            "with a lower learning rate or weight of the term."
        )

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float:
        """As `Trainer` does, and stop before a step that would break the weights.

        Raises:
            NonFiniteLossError: if it is NaN or infinite, where no loss scale makes up for that.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise NonFiniteLossError(
                f"At step {self.state.global_step + 1} the norm of the gradient is {float(norm)}; "
                "start anew in another output_dir, with a lower learning rate or weight of the "
                "term."
            )
        return norm

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Language-model tensors of two or more dimensions."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not name.removeprefix("module.").startswith("heads.")
        ]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """With the heads in a group of their own, if they have another learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.heads_learning_rate
        own = {p for p in self.model.heads.parameters() if p.requires_grad}
        if is_new and rate is not None and own:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p not in own]
            heads = [p for p in self.model.heads.parameters() if p in own]  # in a fixed order
            optimizer.add_param_group({"params": heads, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # ---- figures ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add CE and the term's figures, or a plain model's norms, to the training log."""
        if "loss" in logs and not self.model.heads:
            logs = {**logs, **self._norm_meter.read(self.accelerator)}
        if "loss" in logs and (self.model.heads or self.reference):
            sums = self.accelerator.reduce(self._step_sums, reduction="mean") / self._steps
            ce, kl = sums.tolist()
            logs = {**logs, "ce": ce}
            if self._kl_weight:
                logs["kl_to_base"] = kl
            if self._splices:
                logs |= self._spliced_figures()
            elif self.model.heads:
                plain = self._ce_weight * ce + self._kl_weight * kl
                logs |= {"term_share": 1 - plain / logs["loss"]}
                logs |= self._train_meter.read(self.accelerator) | self._upkeep.figures()
            self._step_sums, self._steps = torch.zeros_like(self._step_sums), 0
        super().log(logs, start_time)

    def _spliced_figures(self) -> dict[str, float]:
        splices, self._splices = self._splices, self._new_splices()
        seen = {hook_name: splice.statistics for hook_name, splice in splices.items()}
        return {
            f"{name}/{hook_name}": figure
            for hook_name, statistics in self.accelerator.reduce(seen).items()
            for name, figure in statistics.figures().items()
        }


__all__ = ["NonFiniteLossError", "SAERegArguments", "SAERegTrainer"]
