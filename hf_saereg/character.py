"""The job of a character model: its options together, its text, its trainings.

Notable:
- everything that can be wrong with the options is found when a job is made, before any training
- a finished training is read from its folder, an interrupted one goes on from its last checkpoint
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from datasets import DatasetDict
from transformers import GPT2Config, PreTrainedTokenizerBase, set_seed

from hf_saereg.cards import publish
from hf_saereg.comparison import describe_setup
from hf_saereg.configuration import CharacterModelArguments, HeadsArguments, TwinArguments
from hf_saereg.corpora import CorpusArguments, character_tokenizer, collate_blocks, load_blocks
from hf_saereg.grid import FreshHeadsArguments
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.options import as_record, parse_options
from hf_saereg.publishing import push_arguments
from hf_saereg.regularizer import TermOptions
from hf_saereg.run_folder import (
    check_run_folder,
    earlier_seconds,
    finished_figures,
    write_run,
)
from hf_saereg.trainer import SAERegArguments, SAERegTrainer

OPTION_CLASSES = (
    SAERegArguments,
    HeadsArguments,
    TermOptions,
    TwinArguments,
    CorpusArguments,
    CharacterModelArguments,
    FreshHeadsArguments,
)


@dataclass
class CharacterJob:
    """Options that belong together, and what follows from them before any training.

    Attributes:
        options: all of them, as `run.json` keeps them.
        blocks: `train` and `validation`.
        setup: what a page says of the run.
        earlier_seconds: of the wall, what its trainings took before this session.
    """

    arguments: SAERegArguments
    heads: HeadsArguments
    term: TermOptions
    twin: TwinArguments
    corpus: CorpusArguments
    shape: CharacterModelArguments
    fresh: FreshHeadsArguments
    options: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    blocks: DatasetDict
    config: GPT2Config
    setup: dict[str, Any]
    earlier_seconds: float = 0.0

    @classmethod
    def from_options(cls, words: Sequence[str] | None = None) -> Self:
        """Read options, check them and the output folder, and load the text.

        Args:
            words: a command line; that of this program by default.

        Raises:
            UserError: if the options cannot be used, or the folder holds another run.
        """
        parsed = parse_options(*OPTION_CLASSES, arguments=words)
        arguments, heads, _term, _twin, corpus, shape, fresh = parsed
        options = as_record(parsed)
        with arguments.main_process_first():
            if arguments.should_save:
                folder = Path(arguments.output_dir)
                check_run_folder(folder, options, resume=arguments.resumes)
            tokenizer = character_tokenizer(corpus.block_size)
            blocks = load_blocks(corpus, tokenizer)
        arguments.check_train_rows(len(blocks["train"]))
        config = shape.config(corpus.block_size, tokenizer)
        setup = describe_setup(arguments, heads, corpus, fresh, config, blocks)
        job = cls(*parsed, options, tokenizer, blocks, config, setup)
        with torch.device("meta"):  # whatever cannot be built fails here, and costs no memory
            job.new_model("regularized")
        write_run(Path(arguments.output_dir), arguments, options)
        return job

    def new_model(self, name: str) -> SAERegGPT2LMHeadModel:
        """The model `plain` or `regularized` before training; only the latter has heads."""
        model = SAERegGPT2LMHeadModel(self.config)
        model.skip_over(self.heads)
        if name == "regularized":
            model.attach_heads(self.heads.head_configs(self.config), self.term)
        return model

    def train(self, name: str) -> tuple[SAERegGPT2LMHeadModel, dict[str, float]]:
        """The model `plain` or `regularized`, trained into a folder of its own below the job's.

        Returns:
            The model as it was saved, and the figures of its training.
        """
        arguments = copy.copy(self.arguments)
        arguments.output_dir = str(Path(self.arguments.output_dir) / name)
        arguments.hub_model_id = self.repository(name)
        arguments.warmup_steps = self.twin.warmup_steps_of(name, arguments.warmup_steps)
        folder, start = Path(arguments.output_dir), time.monotonic()
        figures = finished_figures(folder)
        if figures:
            self.earlier_seconds += figures["wall_seconds"]
        else:
            trainer = self._new_trainer(name, arguments)
            write_run(folder, arguments, self.options)
            figures = trainer.train_to_the_end(start)  # published by `publish`
            self.earlier_seconds += trainer.earlier_seconds
            trainer.describe(folder)  # with what the summary measured
            write_run(folder, arguments, self.options, figures)
        model = SAERegGPT2LMHeadModel.load_whole(folder)
        model.skip_over(self.heads)  # which the plain model's folder does not say
        return model.to(arguments.device), figures

    def wall_seconds(self, start: float) -> float:
        """Seconds of this session, with those of earlier ones whose work was kept.

        Args:
            start: of the program, by `time.monotonic`.
        """
        # a record that was finished once has the trainings in it
        earlier = earlier_seconds(Path(self.arguments.output_dir)) or self.earlier_seconds
        return earlier + time.monotonic() - start

    def untrained(self) -> tuple[SAERegGPT2LMHeadModel, dict[str, float | None]]:
        """The plain model as it starts, and figures as of a training; nothing is saved."""
        trainer = self._new_trainer("plain", self.arguments)
        return trainer.model.eval(), trainer.summary()

    def _new_trainer(self, name: str, arguments: SAERegArguments) -> SAERegTrainer:
        set_seed(arguments.seed)
        return SAERegTrainer(
            self.new_model(name),
            arguments,
            train_dataset=self.blocks["train"],
            eval_dataset=self.blocks["validation"],
            data_collator=collate_blocks,
            processing_class=self.tokenizer,
            head_metadata={"model_name": name, "dataset_path": self.corpus.dataset},
        )

    def repository(self, name: str) -> str:
        """Name on the Hub of the model `plain` or `regularized`."""
        run = self.arguments.hub_model_id or Path(self.arguments.output_dir).absolute().name
        return run if name == "regularized" else f"{run}-{name}"

    def publish(self) -> None:
        """Push both models, if the options say so, with all that was measured of them by now.

        Raises:
            HubError: if the Hub cannot be reached or refuses.
        """
        if not (self.arguments.push_to_hub and self.arguments.should_save):
            return
        for name in ("plain", "regularized"):
            folder = Path(self.arguments.output_dir) / name
            publish(folder, self.repository(name), push_arguments(self.arguments))
