"""A `Trainer` that publishes what `hf_saereg.hub` allows, and nothing else.

Notable:
- the repository is made before the first step, so that a refusal shows before any long work
- `every_save` pushes a copy of the checkpoint in the background: a failure there is logged, the
  training goes on, and the push at the end brings what is missing
- a push at the end saves first; if it fails, the folder can be pushed again
"""

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_saereg.cards import publish, write_card
from hf_saereg.errors import UserError
from hf_saereg.hub import PushArguments, make_repository
from hf_saereg.layout import check_base, published_files

logger = logging.getLogger(__name__)

# how a training was watched and published is no part of what it computed
NOT_PUBLISHED = ("hub_", "push_to_hub", "disable_tqdm", "run_name", "trackio", "resume_from")
STRATEGIES = (HubStrategy.END, HubStrategy.EVERY_SAVE)


def check_strategy(strategy: HubStrategy) -> None:
    """Check that a hub strategy publishes no optimizer state.

    Raises:
        UserError: if it does.
    """
    if strategy not in STRATEGIES:
        raise UserError(
            f"hub_strategy {strategy.value!r} would publish optimizer and random state, which are "
            "pickles; choose end or every_save."
        )


def push_arguments(arguments: TrainingArguments, **changes: Any) -> PushArguments:
    """How a training publishes.

    Args:
        arguments: of the training.
        **changes: in place of what they say, where not None.
    """
    said = PushArguments(
        private=arguments.hub_private_repo,
        revision=arguments.hub_revision,
        commit_message="End of training",
        token=arguments.hub_token,
    )
    return replace(said, **{name: value for name, value in changes.items() if value is not None})


def changed_options(arguments: TrainingArguments) -> dict[str, Any]:
    """Options that differ from their defaults, as JSON; none that say where, or hold a secret.

    Args:
        arguments: of a training.
    """
    record = arguments.to_dict()
    return {
        option.name: record[option.name]
        for option in fields(arguments)
        if not option.name.startswith(NOT_PUBLISHED)
        and not option.name.endswith(("_dir", "_token"))
        and record[option.name] not in (None, option.default)
        and (record[option.name] or option.default)  # [], 0 and false in place of none
        and not isinstance(record[option.name], dict)
        and option.default_factory is MISSING
    }


def publish_finished(arguments: TrainingArguments) -> None:
    """Publish what a run left when it ended, if its options say so by now.

    Args:
        arguments: of the run.

    Raises:
        PublishingError: if its folder holds what may not be published.
        HubError: if the Hub cannot be reached or refuses.
    """
    if arguments.push_to_hub and arguments.should_save:
        publish(arguments.output_dir, _repository(arguments), push_arguments(arguments))


def _repository(arguments: TrainingArguments) -> str:
    return arguments.hub_model_id or Path(arguments.output_dir).absolute().name


class PublishingTrainer(Trainer):
    """Overrides every way in which `Trainer` pushes to the Hub."""

    _pushing: Future | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository unless it is there, on the main process alone.

        Args:
            token: in place of that of the arguments.
            private: likewise.

        Raises:
            HubError: if the Hub cannot be reached or refuses.
            PublishingError: if the model is an adapter on a base that nobody else has.
        """
        if not self.is_world_process_zero():
            return
        if getattr(self.model, "has_adapters", False):
            check_base(self.model.name_or_path)
        repo = _repository(self.args)
        arguments = push_arguments(self.args, token=token, private=private)
        self.hub_model_id = make_repository(repo, arguments)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future | None:
        """Save model, heads, tokenizer and card to the output folder, and publish them.

        Every process must call it; the main one pushes.

        Args:
            commit_message: of the commit.
            blocking: whether to wait until all is published.
            token: in place of that of the arguments.
            revision: branch, in place of that of the arguments.
            private: in place of that of the arguments; of a new repository.

        Returns:
            The commit, or a future of it where it is not waited for; None on other processes.

        Raises:
            HubError: if the Hub cannot be reached or refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        arguments = push_arguments(
            self.args,
            commit_message=commit_message,
            token=token,
            revision=revision,
            private=private,
        )
        job = (publish, self.args.output_dir, self.hub_model_id, arguments)
        return job[0](*job[1:]) if blocking else ThreadPoolExecutor(1).submit(*job)

    def create_model_card(self, license: str | None = None) -> None:
        """Write the card into the output folder, unless there is one that someone has edited.

        Args:
            license: of the model, in place of that of the arguments.
        """
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_card(folder, self.hub_model_id, license or self.args.model_license)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self._pushing is not None and not self._pushing.done()
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # the checkpoint may be deleted by the next one before it is uploaded
        copy = TemporaryDirectory(dir=self.args.output_dir, prefix=".pushing-")
        for name in published_files(Path(checkpoint_folder)):
            target = Path(copy.name) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(checkpoint_folder) / name, target)
        message = f"Training in progress, step {self.state.global_step}"
        self._pushing = ThreadPoolExecutor(1).submit(
            _push_and_delete,
            copy,
            self.hub_model_id,
            push_arguments(self.args, commit_message=message),
        )

    def _finish_current_push(self) -> None:
        if self._pushing is not None:
            self._pushing.result()
            self._pushing = None


def _push_and_delete(copy: TemporaryDirectory, repo: str, arguments: PushArguments) -> None:
    with copy:
        try:
            publish(copy.name, repo, arguments)
        except Exception as error:  # whatever it is, it is no reason to stop a training
            logger.warning("%s The training goes on.", error)
