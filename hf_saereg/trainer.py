"""`Trainer` with the regularization term: CE + term in `compute_loss`, everything else native.

Notable:
- under gradient accumulation and data parallelism each micro-batch's term weighs as its share of
  the tokens, as CE does: what is a mean over tokens matches one large batch exactly, and the ratio
  R / ‖X‖ of the published term is taken per micro-batch and process
- the evaluation loss is plain CE; `eval_objective` is CE + term, or with frozen heads the spliced
  CE or KL that adapters are trained on, for those who select by it; with `eval_fidelity` the heads
  are scored spliced into the model, too
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
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, has_length

from hf_saereg.divergence import kl_of_predictions
from hf_saereg.errors import UserError
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.heads.folder import check_savable
from hf_saereg.meter import NormMeter, TermMeter
from hf_saereg.modeling import SAERegOutput
from hf_saereg.positions import with_positions
from hf_saereg.progress import ReadablePrinter, ReadableProgress
from hf_saereg.recording import RecordingTrainer
from hf_saereg.reference import Reference
from hf_saereg.splicing import Splice
from hf_saereg.training_arguments import SAERegArguments
from hf_saereg.upkeep import HeadUpkeep


class NonFiniteLossError(UserError):
    """CE, the term or the gradient became NaN or infinite; the message names the step."""


class SAERegTrainer(RecordingTrainer):
    """Trains a `SAERegGPT2LMHeadModel` on CE + term; without heads, on CE alone.

    Args:
        *args: as `Trainer` takes them.
        **kwargs: as `Trainer` and `RecordingTrainer` take them.

    Raises:
        HeadConfigError: if a head could not be saved.
        UserError: if `anchor_weight` has nothing to hold, or the training rows are no batch.
    """

    # compute_loss divides by the whole accumulated batch itself
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_sharding()
        if has_length(self.train_dataset):
            self.args.check_train_rows(len(self.train_dataset))
        self._tokens_in_batch: Tensor | None = None
        self._train_meter, self._eval_meter = TermMeter(), TermMeter()
        self._norm_meter = NormMeter()
        # of the steps since the last log: CE and, weighted or not, KL(base ‖ model)
        self._step_sums, self._steps = torch.zeros(2, device=self.args.device), 0
        # over predicted tokens: CE, their number, CE of the base, KL(base ‖ model), spliced loss
        self._eval_sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        check_savable(self.model.heads)
        self._splices = self._new_splices()
        self._check_anchor()
        self._check_frozen()
        self._ce_weight, self._kl_weight = 1.0, self.args.anchor_weight
        if self._splices and self.model.term.splice_loss == "kl":
            self._ce_weight, self._kl_weight = 0.0, 1.0
        self.reference = None
        if self._kl_weight or self.args.eval_base:
            self.reference = Reference(self.model)
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

    def _check_sharding(self) -> None:
        """Refuse what reads the model past the outermost group of its shards."""
        if not self.is_fsdp_enabled:
            return
        unable = {
            "eval_fidelity true": self.args.eval_fidelity,
            f"b_dec_init {self.args.b_dec_init}": self.args.b_dec_init != "zero",
            f"resample_every {self.args.resample_every}": self.args.resample_every > 0,
        }
        for option, is_on in unable.items():
            if is_on:
                raise UserError(
                    f"{option} does not work where FSDP shards the model; leave it out, or launch "
                    "with recipes/accelerate/multi_gpu.yaml."
                )

    def _new_splices(self) -> dict[str, Splice]:
        """The heads in the place of their sites, where they are frozen."""
        heads = self.model.heads if self.model.heads.frozen else []
        return {head.config.hook_name: Splice(head) for head in heads}

    def _check_anchor(self) -> None:
        if not self.args.anchor_weight:
            return
        if self._splices:
            raise UserError(
                "anchor_weight holds the model without reconstructions in it, and frozen heads are "
                "spliced into every step; leave it out, and say splice_loss kl to stay close."
            )
        if not any(p.requires_grad for p in self.model.base_model.parameters()):
            raise UserError(
                "anchor_weight holds the language model, which is frozen here; leave it out."
            )

    def _check_frozen(self) -> None:
        """Refuse what is done to heads that are trained, where they are not."""
        asked = {
            "heads_learning_rate": self.args.heads_learning_rate is not None,
            "b_dec_init": self.args.b_dec_init != "zero",
            "resample_every": self.args.resample_every > 0,
        }
        for option, is_on in asked.items():
            if is_on and self._splices:
                raise UserError(
                    f"{option} is {getattr(self.args, option)}, but the heads are frozen; leave it "
                    "out."
                )

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

    def _reference_logits(self, inputs: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            return self.reference.logits(inputs)

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


__all__ = ["NonFiniteLossError", "SAERegArguments", "SAERegTrainer"]
