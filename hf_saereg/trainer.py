"""`Trainer` with the regularization term: CE + term in `compute_loss`, everything else native.

Notable:
- under gradient accumulation and data parallelism each micro-batch's term weighs as its share of
  the tokens, as CE does: what is a mean over tokens matches one large batch exactly, and the ratio
  R / ‖X‖ of the published term is taken per micro-batch and process
- the evaluation loss is plain CE; `eval_objective` is CE + term, for those who select by it; with
  `eval_fidelity` the heads are scored spliced into the model, too
- after each optimizer step the heads see what the tokens of all processes did: dead latents are
  counted and coefficients steered alike everywhere
- weight decay touches language-model tensors of two or more dimensions, nothing of the heads
- without heads ‖x‖ a site is read on the steps that are logged, as heads tell it on every step
- frozen heads are not regularized with: their reconstructions take the place of the activations
  while the model trains, in the backward pass too, which may compute the blocks again
- with `anchor_weight` the loss has KL(base ‖ model) on the plain path, with `eval_base` evaluations
  measure it; the base is the model as it was given, without adapters
- a checkpoint counts as complete once `trainer_state.json` is in it, which is written last, after
  every process has written what is its own
- no pickle is written beside the weights; optimizer and random state stay in `checkpoint-*`
"""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from hf_saereg.cards import write_card
from hf_saereg.corpora import first_rows
from hf_saereg.divergence import kl_of_predictions
from hf_saereg.errors import UserError
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.heads.folder import check_matches, check_savable
from hf_saereg.heads.health import centre, resample
from hf_saereg.layout import TRAINING_RECORD, without_folder
from hf_saereg.meter import NormMeter, TermMeter
from hf_saereg.modeling import SAERegOutput
from hf_saereg.progress import ReadableProgress
from hf_saereg.publishing import PublishingTrainer, changed_options
from hf_saereg.reference import Reference
from hf_saereg.resuming import SESSION_FILE, last_complete_checkpoint
from hf_saereg.run_folder import package_versions, write_json
from hf_saereg.sharding import load_full_state
from hf_saereg.splicing import Splice
from hf_saereg.training_arguments import SAERegArguments


class NonFiniteLossError(UserError):
    """CE or the term became NaN or infinite; the message names the step and the site."""


class SAERegTrainer(PublishingTrainer):
    """Trains a `SAERegGPT2LMHeadModel` on CE + term; without heads, on CE alone.

    Args:
        *args: as `Trainer` takes them.
        head_metadata: written into every saved head: `dataset_path`, `model_name`, …
        **kwargs: as `Trainer` takes them.

    Raises:
        HeadConfigError: if a head could not be saved.
        UserError: if `anchor_weight` has nothing to hold.
    """

    # compute_loss divides by the whole accumulated batch itself
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        head_metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.ddp_find_unused_parameters is None:
            # heads that a step leaves out get no gradient; otherwise every parameter does
            self.args.ddp_find_unused_parameters = self.model.term.sites_per_step is not None
        self.head_metadata = head_metadata
        self.train_seconds = 0.0  # of training steps alone, over all sessions of a resumed run
        self._clock_started: float | None = None
        self._tokens_in_batch: Tensor | None = None
        self._train_meter, self._eval_meter = TermMeter(), TermMeter()
        self._norm_meter = NormMeter()
        # of the steps since the last log: CE and, weighted or not, KL(base ‖ model)
        self._step_sums, self._steps = torch.zeros(2, device=self.args.device), 0
        # over predicted tokens: CE, their number, CE of the base, KL(base ‖ model)
        self._eval_sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        check_savable(self.model.heads)
        self._splices = self._new_splices()
        self._check_anchor()
        self._ce_weight, self._kl_weight = 1.0, self.args.anchor_weight
        if self._splices and self.model.term.splice_loss == "kl":
            self._ce_weight, self._kl_weight = 0.0, 1.0
        self.reference = None
        if self._kl_weight or self.args.eval_base:
            self.reference = Reference(self.model)
        for head in self.model.heads:
            head.kernel = self.args.kernel
        # per site, of the micro-batches since the last optimizer step: fired, tokens
        self._unobserved: dict[str, tuple[Tensor, Tensor]] = {}
        self._micro_batch = 0  # since the last optimizer step
        self._last_inputs: dict[str, Any] = {}
        if self.model.heads and not self._splices:
            self.add_callback(HeadUpkeep(self))
        if self.pop_callback(ProgressCallback) or self.pop_callback(PrinterCallback):
            self.add_callback(ReadableProgress())

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

    # ---- loss ----

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
        for splice in self._splices.values():
            splice.mask = inputs.get("attention_mask")
        with self.model.at_sites(self._splices), self._reading_norms(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def _reading_norms(self, inputs: dict[str, Any]) -> AbstractContextManager:
        """On steps that are logged, where there are no heads to tell the norms."""
        step, interval = self.state.global_step + 1, self.state.logging_steps
        is_first = step == 1 and self.args.logging_first_step
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS
        if self.model.heads or not (is_first or (by_steps and step % interval == 0)):
            return nullcontext()
        return self._norm_meter.reading(self.model, inputs.get("attention_mask"))

    def _reference_logits(self, inputs: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            return self.reference.logits(inputs)

    def get_batch_samples(
        self,
        epoch_iterator: Any,
        num_batches: int,
        device: torch.device,
    ) -> tuple[list, Tensor | int | None]:
        """Also count the tokens that the heads will see in the accumulated batch."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(_token_count(inputs) for inputs in samples), device=device)
        self._tokens_in_batch = self.accelerator.reduce(tokens)
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
            self._remember(inputs, output)
            term = output.term * _token_count(inputs) * processes / self._tokens_in_batch
            if output.spliced_loss is not None:
                term = term + factor * self.model.term.splice_weight * output.spliced_loss
            loss = loss + self.model.term.warmup_factor(self.state.global_step) * term
        return loss

    def _count_real_rows(
        self, model: nn.Module, ce: Tensor, output: SAERegOutput, inputs: dict[str, Any]
    ) -> None:
        rows = len(inputs["labels"])
        real = self._real_rows(rows)
        if 0 < real < rows:
            inputs = {name: tensor[:real] for name, tensor in inputs.items()}
            output = model(**inputs)
            ce = output.loss
        if real > 0:
            self._count_evaluation(ce, output, inputs)

    def _real_rows(self, rows: int) -> int:
        """How many of a batch are not there only to give every process equally many."""
        last = self.accelerator.gradient_state
        if self.args.world_size == 1 or not last.end_of_dataloader or last.remainder <= 0:
            return rows
        return min(max(last.remainder - self.args.process_index * rows, 0), rows)

    def _count_evaluation(self, ce: Tensor, output: SAERegOutput, inputs: dict[str, Any]) -> None:
        labels = inputs["labels"]
        predicted = (labels[:, 1:] != -100).sum()
        base_ce = kl = torch.zeros_like(ce)
        if self.reference is not None:
            base = self._reference_logits(inputs)
            base_ce = self.model.loss_function(base, labels, self.model.config.vocab_size)
            kl = kl_of_predictions(base, output.logits, labels)
        self._eval_sums += torch.stack([ce.detach(), torch.ones_like(ce), base_ce, kl]) * predicted
        if output.term is not None:
            self._eval_meter.update(output.sites)

    def _term_inputs(self) -> dict[str, int]:
        """What the random choices of a micro-batch depend on: a resumed run makes them again."""
        draw = self._micro_batch * self.args.world_size + self.args.process_index
        self._micro_batch += 1
        return {"term_step": self.state.global_step, "term_draw": draw}

    def _remember(self, inputs: dict[str, Any], output: SAERegOutput) -> None:
        self._last_inputs = inputs
        for hook_name, site in output.sites.items():
            seen = (site.losses.statistics.fired, site.losses.statistics.tokens)
            if hook_name in self._unobserved:
                seen = tuple(map(torch.add, self._unobserved[hook_name], seen))
            self._unobserved[hook_name] = seen

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
            f"At step {step} {' and '.join(broken)}; lower the learning rate "
            "or the weight of the term, and resume from the last checkpoint."
        )

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

    # ---- upkeep of the heads ----

    def after_optimizer_step(self) -> None:
        """Let the heads see what all processes' tokens did in the step that is over."""
        seen, self._unobserved = self.accelerator.reduce(self._unobserved), {}
        for head in self.model.heads:
            if head.config.hook_name in seen:
                head.observe(*seen[head.config.hook_name])
        step = self.state.global_step + 1
        if self.args.resample_every and step % self.args.resample_every == 0:
            self._resample(step)

    def _resample(self, step: int) -> None:
        activations = self._activations(self._last_inputs)
        generator = torch.Generator().manual_seed(step)
        for head in self.model.heads:
            resample(head, activations[head.config.hook_name], generator, self.optimizer.optimizer)
            for parameter in head.parameters():  # every process has other tokens
                parameter.data = broadcast(parameter.data)

    def initialise_biases(self) -> None:
        """Start `b_dec` of every head in the middle of the first training rows' activations."""
        rows = first_rows(self.train_dataset, self.args.b_dec_init_rows)
        inputs = self._prepare_inputs(self.data_collator(rows))
        for hook_name, x in self._activations(inputs).items():
            head = self.model.heads[hook_name]
            read = head.normalise(x.to(head.W_dec.dtype)).x
            head.b_dec.data.copy_(centre(read, self.args.b_dec_init))

    @torch.no_grad()
    def _activations(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """(tokens, d_in) by hook name, without padding."""
        with self.model.reading(self.model.heads.hook_names) as activations:
            mask = inputs.get("attention_mask")
            self.model.transformer(inputs["input_ids"], attention_mask=mask, use_cache=False)
        if mask is None:
            return {hook_name: x.flatten(0, 1) for hook_name, x in activations.items()}
        return {hook_name: x[mask.bool()] for hook_name, x in activations.items()}

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
                logs |= self._train_meter.read(self.accelerator) | self._upkeep_figures()
            self._step_sums, self._steps = torch.zeros_like(self._step_sums), 0
        super().log(logs, start_time)

    def _upkeep_figures(self) -> dict[str, float]:
        figures = {}
        for head in self.model.heads:
            figures[f"coefficient/{head.config.hook_name}"] = float(head.coefficient)
            # by tokens since a latent last fired, not by this window alone
            figures[f"dead_fraction/{head.config.hook_name}"] = head.dead.double().mean().item()
        return figures

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
        ce, predicted, base_ce, kl = self.accelerator.reduce(self._eval_sums).tolist()
        if predicted == 0:
            raise UserError(
                "The evaluation read no token that is predicted: give it a text of at least one "
                "batch, lower per_device_eval_batch_size, or leave dataloader_drop_last out."
            )
        figures["loss"] = ce / predicted
        if self.reference is not None:
            figures |= {"base_loss": base_ce / predicted, "kl_to_base": kl / predicted}
        figures["objective"] = figures["loss"] + figures.get("term", 0.0)
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

    def train_to_the_end(self, start: float) -> dict[str, float]:
        """Train, from the last complete checkpoint on where there is one; save without publishing.

        Args:
            start: of the program, by `time.monotonic`.

        Returns:
            `summary`, and `wall_seconds` since the start.
        """
        last = last_complete_checkpoint(Path(self.args.output_dir))
        self.train(resume_from_checkpoint=last)
        self.save_model(_internal_call=True)
        self.save_state()  # with all that was logged
        return self.summary() | {"wall_seconds": time.monotonic() - start}

    def summary(self) -> dict[str, float]:
        """What training led to: `eval_ce` and `train_ce` in nats a token, and what it cost.

        `train_ce` is over as many training blocks, from the start of the text, as there are
        validation blocks; `base_ce` and `kl_to_base` are there with `eval_base` or an anchor;
        `parameters` are the language model's, `trained_parameters` what the mode trains, heads and
        adapters among them. Every process must call it.
        """
        head_of_train = first_rows(self.train_dataset, len(self.eval_dataset))
        eval_metrics = self.evaluate()
        train_metrics = self.evaluate(head_of_train, metric_key_prefix="train")
        base = {}
        if self.reference is not None:
            base = {"base_ce": eval_metrics["eval_base_loss"]}
            base |= {"kl_to_base": eval_metrics["eval_kl_to_base"]}
        tokens = self.state.global_step * self._tokens_per_step()
        return {
            "eval_ce": eval_metrics["eval_loss"],
            "eval_objective": eval_metrics["eval_objective"],
            **base,
            "train_ce": train_metrics["train_loss"],
            "tokens_per_second": tokens / self.train_seconds,
            "train_seconds": self.train_seconds,
            "steps": self.state.global_step,
            "parameters": sum(p.numel() for p in self.model.plain_view().parameters()),
            "trained_parameters": sum(
                p.numel() for p in self.model.parameters() if p.requires_grad
            ),
        }

    # ---- checkpoints ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, with a clock that stands still in evaluations and checkpoints."""
        self.train_seconds, self._clock_started = 0.0, time.monotonic()
        result = super().train(*args, **kwargs)
        with self._clock_stopped():
            pass
        self._clock_started = None
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # resumed from the last step's checkpoint, `Trainer` would do one step more
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`."""
        with self._clock_stopped():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        if self._clock_started is None:
            yield
            return
        self.train_seconds += time.monotonic() - self._clock_started
        yield
        self._clock_started = time.monotonic()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return
        self.model.save_pretrained(
            output_dir, state_dict=state_dict, head_metadata=self.head_metadata
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        self.describe(Path(output_dir))

    def save_merged(self, folder: Path) -> None:
        """Merge the adapters into the model, and save the plain GPT-2 that it is then.

        Args:
            folder: created if absent.

        Raises:
            AdapterError: if there is no adapter, or the merged weights are not finite.
        """
        self.model.merge_and_unload()
        self._save(str(folder))

    def describe(self, folder: Path) -> None:
        """Write `training.json` and the card beside a saved model: what is known of it by now.

        The main process does; for any other, this does nothing.

        Args:
            folder: of a checkpoint of this trainer.
        """
        if not self.args.should_save:
            return
        name = self.model.config.name_or_path
        evaluations = [log for log in self.state.log_history if "eval_loss" in log]
        record = {
            "base_model": name if name and not Path(name).exists() else None,
            "dataset": (self.head_metadata or {}).get("dataset_path"),
            "steps": self.state.global_step,
            "tokens_per_step": self._tokens_per_step(),
            "train_seconds": self.train_seconds,
            "seed": self.args.seed,
            "world_size": self.args.world_size,
            "device": self.args.device.type,
            "evaluation": evaluations[-1] if evaluations else {},
            "options": changed_options(self.args),
            "versions": package_versions(),
        }
        write_json(folder / TRAINING_RECORD, without_folder(record))
        write_card(folder, self.hub_model_id, self.args.model_license)

    def _tokens_per_step(self) -> int:
        if self.train_dataset is None:
            return 0
        return self.get_total_train_batch_size(self.args) * self._row_length

    @cached_property
    def _row_length(self) -> int:
        return len(first_rows(self.train_dataset, 1)[0]["input_ids"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._clock_stopped():
            if self.args.should_save:
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / SESSION_FILE, {"train_seconds": self.train_seconds})
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # what marks the checkpoint as complete is written next, by one process for all
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._load_weights(Path(resume_from_checkpoint))
        session = json.loads((Path(resume_from_checkpoint) / SESSION_FILE).read_text())
        self.train_seconds = session["train_seconds"]

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, checkpoint: Path) -> None:
        """Language model and heads, into the parameters that the optimizer already holds."""
        saved = type(self.model).from_pretrained(checkpoint)
        check_matches(saved.heads.configs, self.model.heads.configs)
        load_full_state(self.model, saved.state_dict())


class HeadUpkeep(TrainerCallback):
    """Calls the trainer back where its loop has no method to override."""

    def __init__(self, trainer: SAERegTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: SAERegArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Initialise biases, unless the run goes on from a checkpoint."""
        if state.global_step == 0 and args.b_dec_init != "zero":
            self.trainer.initialise_biases()

    def on_optimizer_step(
        self, args: SAERegArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count, steer, constrain, resample."""
        self.trainer.after_optimizer_step()


def _token_count(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


__all__ = ["NonFiniteLossError", "SAERegArguments", "SAERegTrainer"]
