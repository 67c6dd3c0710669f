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
- a checkpoint counts as complete once `trainer_state.json`, written last, is in it
- no pickle is written beside the weights; optimizer and random state stay in `checkpoint-*`
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from hf_saereg import kernels
from hf_saereg.cards import LICENSE, write_card
from hf_saereg.errors import UserError
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.heads.folder import check_matches, check_savable
from hf_saereg.heads.health import CENTRES, centre, resample
from hf_saereg.layout import TRAINING_RECORD, without_folder
from hf_saereg.meter import TermMeter
from hf_saereg.modeling import SAERegOutput
from hf_saereg.publishing import PublishingTrainer, changed_options, check_strategy
from hf_saereg.run_folder import package_versions, write_json

SESSION_FILE = "saereg_session.json"
STATE_FILE = "trainer_state.json"


class NonFiniteLossError(UserError):
    """CE or the term became NaN or infinite; the message names the step and the site."""


@dataclass
class SAERegArguments(TrainingArguments):
    """`TrainingArguments` with the options of the term.

    Args:
        kernel: how the heads' losses are computed: auto, dense, sparse (on a CPU) or triton (on a
            GPU).
        b_dec_init: where `b_dec` of new heads starts: zero, or the mean or geometric_median of the
            first training rows' activations.
        b_dec_init_rows: how many rows.
        resample_every: steps after which dead latents get a new life; 0 for never.
        eval_fidelity: at each evaluation, also splice the heads into the model and score them.
        model_license: of the published model, as the Hub abbreviates it.
        metric_for_best_model: `loss` selects by CE, `objective` by CE + term, as published.
        report_to: TensorBoard unless said otherwise.

    Raises:
        UserError: if there is no such kernel or centre, the kernel does not run on the device, a
            number cannot be, or `hub_strategy` publishes optimizer state.
    """

    output_dir: str = field(default="runs/train", metadata={"help": "Folder of the run."})
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where scalars go."}
    )
    kernel: str = field(
        default="auto",
        metadata={
            "help": "How the heads' losses are computed: auto, dense, sparse (CPU) or triton (GPU)."
        },
    )

    b_dec_init: str = field(
        default="zero",
        metadata={"help": "Where b_dec of new heads starts: zero, mean or geometric_median."},
    )
    b_dec_init_rows: int = field(
        default=64, metadata={"help": "Training rows that b_dec is initialised from."}
    )
    resample_every: int = field(
        default=0, metadata={"help": "Steps after which dead latents start anew; 0: never."}
    )

    eval_fidelity: bool = field(
        default=False,
        metadata={
            "help": "At each evaluation also score the heads spliced into the model: CE increase, "
            "CE recovered and KL a site, compound; costs about four forward passes a site more."
        },
    )
    model_license: str = field(
        default=LICENSE, metadata={"help": "License of the model, for its card."}
    )

    def __post_init__(self) -> None:
        if self.b_dec_init not in CENTRES:
            raise UserError(
                f"b_dec_init is {self.b_dec_init!r}; choose one of {', '.join(CENTRES)}."
            )
        for name, least in (("b_dec_init_rows", 1), ("resample_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("objective"):
            self.greater_is_better = False  # `TrainingArguments` knows this of `loss` only
        super().__post_init__()
        kernels.check(self.kernel, self.device)
        check_strategy(self.hub_strategy)

    @property
    def resumes(self) -> bool:
        """Whether an interrupted run in `output_dir` is to be continued.

        Raises:
            UserError: if it names a checkpoint; the last complete one is found instead.
        """
        answer = str(self.resume_from_checkpoint).lower()
        if answer not in ("true", "false", "none"):
            raise UserError(
                f"resume_from_checkpoint is {self.resume_from_checkpoint!r}; say true or false, "
                "the last complete checkpoint in output_dir is then found."
            )
        return answer == "true"


class SAERegTrainer(PublishingTrainer):
    """Trains a `SAERegGPT2LMHeadModel` on CE + term; without heads, on CE alone.

    Args:
        *args: as `Trainer` takes them.
        head_metadata: written into every saved head: `dataset_path`, `model_name`, …
        **kwargs: as `Trainer` takes them.

    Raises:
        HeadConfigError: if a head could not be saved.
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
        self._ce_sum, self._steps = torch.zeros((), device=self.args.device), 0
        # summed over predicted tokens, and their number
        self._eval_ce = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        check_savable(self.model.heads)
        for head in self.model.heads:
            head.kernel = self.args.kernel
        # per site, of the micro-batches since the last optimizer step: fired, tokens
        self._unobserved: dict[str, tuple[Tensor, Tensor]] = {}
        self._micro_batch = 0  # since the last optimizer step
        self._last_inputs: dict[str, Any] = {}
        if self.model.heads:
            self.add_callback(HeadUpkeep(self))
        if self.pop_callback(ProgressCallback) or self.pop_callback(PrinterCallback):
            self.add_callback(ReadableProgress())

    # ---- loss ----

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
        if model.training and self.model.heads:
            inputs = {**inputs, **self._term_inputs()}
        ce, output = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._check_finite(ce, output)
        loss = ce
        if model.training:
            self._ce_sum += ce.detach()
        else:
            predicted = (inputs["labels"][:, 1:] != -100).sum()
            self._eval_ce += torch.stack([ce.detach() * predicted, predicted])
        if output.term is not None:
            meter = self._train_meter if model.training else self._eval_meter
            meter.update(output.sites)
            if model.training:
                self._remember(inputs, output)
                # DDP averages gradients over processes, hence the factor; CE carries it already
                tokens = _token_count(inputs) * self.accelerator.num_processes
                term = output.term * tokens / self._tokens_in_batch
                if output.spliced_loss is not None:
                    averaged = num_items_in_batch is not None
                    factor = self.accelerator.num_processes if averaged else 1
                    term = term + factor * self.model.term.splice_weight * output.spliced_loss
                loss = ce + self.model.term.warmup_factor(self.state.global_step) * term
        return (loss, output) if return_outputs else loss

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
        number = min(self.args.b_dec_init_rows, len(self.train_dataset))
        rows = [self.train_dataset[i] for i in range(number)]
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
        """Add CE and the term's figures to the training log."""
        if "loss" in logs and self.model.heads:
            ce = self.accelerator.reduce(self._ce_sum, reduction="mean").item() / self._steps
            logs = {**logs, "ce": ce, "term_share": 1 - ce / logs["loss"]}
            logs |= self._train_meter.read(self.accelerator)
            for head in self.model.heads:
                logs[f"coefficient/{head.config.hook_name}"] = float(head.coefficient)
                # by tokens since a latent last fired, not by this window alone
                logs[f"dead_fraction/{head.config.hook_name}"] = head.dead.double().mean().item()
            self._ce_sum, self._steps = torch.zeros_like(self._ce_sum), 0
        super().log(logs, start_time)

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
        self._eval_ce.zero_()
        output = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        figures = self._eval_meter.read(self.accelerator)
        if self.args.eval_fidelity and self.model.heads:
            figures |= self._fidelity(dataloader)
        ce_sum, predicted = self.accelerator.reduce(self._eval_ce).tolist()
        figures["loss"] = ce_sum / predicted
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

    def summary(self) -> dict[str, float]:
        """What training led to: `eval_ce` and `train_ce` in nats a token, and what it cost.

        `train_ce` is over as many training blocks, from the start of the text, as there are
        validation blocks. Every process must call it.
        """
        n_blocks = min(len(self.train_dataset), len(self.eval_dataset))
        head_of_train = self.train_dataset.select(range(n_blocks))
        eval_metrics = self.evaluate()
        train_metrics = self.evaluate(head_of_train, metric_key_prefix="train")
        tokens = self.state.global_step * self._tokens_per_step()
        return {
            "eval_ce": eval_metrics["eval_loss"],
            "eval_objective": eval_metrics["eval_objective"],
            "train_ce": train_metrics["train_loss"],
            "tokens_per_second": tokens / self.train_seconds,
            "train_seconds": self.train_seconds,
            "steps": self.state.global_step,
            "parameters": sum(p.numel() for p in self.model.plain_view().parameters()),
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

    def describe(self, folder: Path) -> None:
        """Write `training.json` and the card beside a saved model: what is known of it by now.

        Args:
            folder: of a checkpoint of this trainer.
        """
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
        rows = self.get_total_train_batch_size(self.args)
        return rows * len(self.train_dataset[0]["input_ids"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._clock_stopped():
            if self.args.should_save:
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / SESSION_FILE, {"train_seconds": self.train_seconds})
            super()._save_checkpoint(model, trial)

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
        self.model.load_state_dict(saved.state_dict())


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


class ReadableProgress(ProgressCallback):
    """A progress bar whose log lines put the sites of one figure side by side."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line: scalars first, then each figure over all sites."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        by_figure: dict[str, list[str]] = {}
        for name, value in logs.items():
            if name == "total_flos":
                continue
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            by_figure.setdefault(name.split("/")[0], []).append(text)
        parts = [f"{name} {' '.join(values)}" for name, values in by_figure.items()]
        self.training_bar.write(f"step {state.global_step} | " + " | ".join(parts))


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end, None when there is none.

    A process killed while it wrote leaves a folder without a readable `trainer_state.json`.

    Args:
        output_dir: folder of a run.
    """
    complete = [
        folder
        for folder in output_dir.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit() and _is_json(folder / STATE_FILE)
    ]
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def _token_count(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())
