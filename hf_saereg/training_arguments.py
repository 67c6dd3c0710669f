"""`TrainingArguments` with the options of the term and of what a model is kept close to."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from hf_saereg import kernels
from hf_saereg.cards import LICENSE
from hf_saereg.errors import UserError
from hf_saereg.heads.health import CENTRES
from hf_saereg.processes import PATIENCE, check_joined
from hf_saereg.publishing import check_strategy

_SPOILS = {
    "save_only_model": "and a run that resumes without its optimizer is another run",
    "bf16_full_eval": "which rounds the weights that are saved after an evaluation",
    "fp16_full_eval": "which rounds the weights that are saved after an evaluation",
}


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
        heads_learning_rate: of the heads, where it is another than the language model's.
        anchor_weight: of KL(base ‖ model) in the loss, nats a predicted token; the base is the
            model as it was given to the trainer.
        eval_base: at each evaluation, also measure CE of the base and KL(base ‖ model).
        eval_fidelity: at each evaluation, also splice the heads into the model and score them.
        model_license: of the published model, as the Hub abbreviates it.
        ddp_timeout: seconds that one process waits for another: 30 days, because a long text is
            tokenised by the main one while all others wait.
        dataloader_drop_last: of training alone; an evaluation reads every row.
        metric_for_best_model: `loss` selects by CE, `objective` by CE + term, as published.
        report_to: TensorBoard unless said otherwise.

    Raises:
        UserError: if there is no such kernel, centre or place to report to, the kernel does not run
            on the device, a number cannot be, labels are smoothed, checkpoints would not resume,
            processes are not joined, one has several GPUs, or `hub_strategy` publishes optimizer
            state.
    """

    output_dir: str = field(default="runs/train", metadata={"help": "Folder of the run."})
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where scalars go."}
    )
    ddp_timeout: int = field(
        default=int(PATIENCE.total_seconds()),
        metadata={"help": "Seconds that a process waits for another, which may be tokenising."},
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

    heads_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the heads; learning_rate by default."},
    )
    anchor_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of KL(base ‖ model), the base being the model at the start."},
    )
    eval_base: bool = field(
        default=False,
        metadata={"help": "At each evaluation also measure the base's CE and KL(base ‖ model)."},
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
        if not (math.isfinite(self.anchor_weight) and self.anchor_weight >= 0):
            raise UserError(
                f"anchor_weight is {self.anchor_weight}; it must be a finite number ≥ 0."
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise UserError(
                f"learning_rate is {self.learning_rate}; it must be a finite number ≥ 0."
            )
        if self.label_smoothing_factor != 0:
            raise UserError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, for which Trainer keeps "
                "the labels from the model, and without them there is no term; leave it out."
            )
        if self.heads_learning_rate is not None and not self.heads_learning_rate > 0:
            raise UserError(
                f"heads_learning_rate is {self.heads_learning_rate}; it must be above 0."
            )
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("objective"):
            self.greater_is_better = False  # `TrainingArguments` knows this of `loss` only
        super().__post_init__()
        for name in self.report_to:  # a list by now
            if name not in INTEGRATION_TO_CALLBACK:
                raise UserError(
                    f"report_to names {name!r}; choose from {', '.join(INTEGRATION_TO_CALLBACK)}, "
                    "or none."
                )
        self._check_processes()
        for name in ("save_only_model", "bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise UserError(f"{name} is true, {_SPOILS[name]}; leave it out.")
        kernels.check(self.kernel, self.device)
        check_strategy(self.hub_strategy)

    def _check_processes(self) -> None:
        check_joined(self.world_size)
        if self.n_gpu > 1:
            raise UserError(
                f"One process sees {self.n_gpu} GPUs, and would split each batch among them, which "
                "the term is not made for; launch with recipes/accelerate/multi_gpu.yaml for one "
                "process a GPU, or set CUDA_VISIBLE_DEVICES=0."
            )

    def check_train_rows(self, rows: int) -> None:
        """Check that a training split has a batch to step on.

        Args:
            rows: of the split.

        Raises:
            UserError: if its only batch is not full, and `dataloader_drop_last` drops it.
        """
        batch = self.train_batch_size * self.world_size
        if self.dataloader_drop_last and rows < batch:
            raise UserError(
                f"The training split has {rows} rows, fewer than the {batch} of one batch over "
                f"{self.world_size} process(es), and dataloader_drop_last drops what is not full: "
                "take a longer text, lower per_device_train_batch_size, or leave "
                "dataloader_drop_last out."
            )

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
