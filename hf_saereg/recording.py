"""A `Trainer` that keeps what a training came to: checkpoints, time, figures, a card.

Notable:
- a checkpoint counts as complete once `trainer_state.json` is in it, which is written last, after
  every process has written what is its own
- no pickle is written beside the weights; optimizer and random state stay in `checkpoint-*`
- the clock stands still in evaluations and checkpoints, and goes on where it was in a resumed run
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_saereg.cards import write_card
from hf_saereg.corpora import first_rows
from hf_saereg.heads.folder import check_matches
from hf_saereg.layout import TRAINING_RECORD, without_folder
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.publishing import PublishingTrainer, changed_options
from hf_saereg.resuming import SESSION_FILE, last_complete_checkpoint
from hf_saereg.run_folder import package_versions, write_json
from hf_saereg.sharding import load_full_state


class RecordingTrainer(PublishingTrainer):
    """Saves and restores a `SAERegGPT2LMHeadModel` with its heads; counts the time of training.

    Args:
        *args: as `Trainer` takes them.
        head_metadata: written into every saved head: `dataset_path`, `model_name`, …
        **kwargs: as `Trainer` takes them.
    """

    def __init__(
        self, *args: Any, head_metadata: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_metadata = head_metadata
        self.train_seconds = 0.0  # of training steps alone, over all sessions of a resumed run
        self._clock_started: float | None = None
        self.earlier_seconds = 0.0  # of the wall, in the sessions that the checkpoint came from
        self._session_started = time.monotonic()

    def train_to_the_end(self, start: float) -> dict[str, float]:
        """Train, from the last complete checkpoint on where there is one; save without publishing.

        Args:
            start: of the program, by `time.monotonic`.

        Returns:
            `summary`, and `wall_seconds` since the start, with those of the sessions that led to
            the checkpoint.
        """
        self._session_started = start
        last = last_complete_checkpoint(Path(self.args.output_dir))
        self.train(resume_from_checkpoint=last)
        self.save_model(_internal_call=True)
        self.save_state()  # with all that was logged
        return self.summary() | {"wall_seconds": self._wall_seconds()}

    def _wall_seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self._session_started

    def summary(self) -> dict[str, float | None]:
        """What training led to: `eval_ce` and `train_ce` in nats a token, and what it cost.

        `train_ce` is over as many training blocks, from the start of the text, as there are
        validation blocks; `base_ce` and `kl_to_base` are there with `eval_base` or an anchor;
        `parameters` are the language model's, `trained_parameters` what the mode trains, heads and
        adapters among them. A model that was not trained has no speed. Every process must call it.
        """
        head_of_train = first_rows(self.train_dataset, len(self.eval_dataset))
        eval_metrics = self.evaluate()
        train_metrics = self.evaluate(head_of_train, metric_key_prefix="train")
        base = {}
        if "eval_base_loss" in eval_metrics:
            base = {"base_ce": eval_metrics["eval_base_loss"]}
            base |= {"kl_to_base": eval_metrics["eval_kl_to_base"]}
        tokens = self.state.global_step * self._tokens_per_step()
        return {
            "eval_ce": eval_metrics["eval_loss"],
            "eval_objective": eval_metrics["eval_objective"],
            **base,
            "train_ce": train_metrics["train_loss"],
            "tokens_per_second": tokens / self.train_seconds if self.train_seconds else None,
            "train_seconds": self.train_seconds,
            "steps": self.state.global_step,
            "parameters": sum(p.numel() for p in self.model.plain_view().parameters()),
            "trained_parameters": sum(
                p.numel() for p in self.model.parameters() if p.requires_grad
            ),
        }

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, with a clock that stands still in evaluations and checkpoints."""
        self.train_seconds, self.earlier_seconds = 0.0, 0.0
        self._clock_started = time.monotonic()
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

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As `Trainer.get_eval_dataloader`, of every row: only training drops a last batch."""
        with self._dropping_nothing():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As `Trainer.get_test_dataloader`, of every row."""
        with self._dropping_nothing():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _dropping_nothing(self) -> Iterator[None]:
        # `Trainer` has one option for all loaders, and reads it where it makes them
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = asked

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
        if self.args.should_save:
            self._write(self.model, Path(output_dir), state_dict)

    def _write(
        self, model: SAERegGPT2LMHeadModel, folder: Path, state_dict: dict[str, Tensor] | None
    ) -> None:
        model.save_pretrained(folder, state_dict=state_dict, head_metadata=self.head_metadata)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        self.describe(folder)

    def save_merged(self, folder: Path) -> None:
        """Merge the adapter that lies in `output_dir` into its base, and save that plain GPT-2.

        The main process does; for any other, this does nothing. The model in training, which may be
        shared out among processes, stays as it is.

        Args:
            folder: created if absent.

        Raises:
            AdapterError: if there is no adapter, or the merged weights are not finite.
        """
        if not self.args.should_save:
            return
        model = type(self.model).load_whole(
            self.args.output_dir, config=self.model.config, dtype=self.model.dtype
        )
        model.merge_and_unload()
        self._write(model, folder, None)

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
                session = {"train_seconds": self.train_seconds}
                write_json(folder / SESSION_FILE, session | {"wall_seconds": self._wall_seconds()})
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
        # a checkpoint of an earlier version knows no other time
        self.earlier_seconds = session.get("wall_seconds", self.train_seconds)

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, checkpoint: Path) -> None:
        """Language model and heads, into the parameters that the optimizer already holds."""
        saved = type(self.model).load_whole(checkpoint)
        check_matches(saved.heads.configs, self.model.heads.configs)
        load_full_state(self.model, saved.state_dict())
