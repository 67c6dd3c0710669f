"""GPT-2 that carries sparse autoencoders on its residual stream.

Notable:
- the term is computed inside `forward`, so DDP and FSDP see every parameter used; without labels
  (`generate`) the heads cost nothing
- heads are attached after `transformers` has loaded and initialised the language model, so neither
  can touch the other's weights
- what is saved at the root is a plain `GPT2LMHeadModel`; the heads go to `saes/`
- `token_mask` says of every batch which tokens are read, in training and evaluation alike; what it
  leaves out beside padding comes with the heads, or is told to a model without them
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import can_return_tuple

from hf_saereg.adapters import Adapted
from hf_saereg.cards import publish
from hf_saereg.checkpoint import CheckpointError, find_checkpoint
from hf_saereg.divergence import kl_of_predictions
from hf_saereg.heads import HeadConfigError, SAEHead, SAEHeadConfig, SkipOptions, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.folder import (
    check_matches,
    check_savable,
    load_head,
    save_heads,
    saved_hook_names,
)
from hf_saereg.heads.tokens import token_mask, tokens_read
from hf_saereg.hub import HUB_OPTIONS, PushArguments
from hf_saereg.layout import MODEL_CONFIG
from hf_saereg.regularizer import SiteTerm, TermOptions, random_tokens, regularization
from hf_saereg.sites import SitedGPT2LMHeadModel
from hf_saereg.splicing import Splice


@dataclass
class SAERegOutput(CausalLMOutputWithCrossAttentions):
    """A causal language model's output with the heads' losses beside it.

    Args:
        term: () regularization term, not part of `loss`; None when it was not asked for.
        spliced_loss: () CE or KL of a forward pass with reconstructions in place of the
            activations, scaled as `loss` is; None unless the model's `term` gives it a weight.
        sites: each site's losses and part of the term, by hook name.
    """

    term: Tensor | None = None
    spliced_loss: Tensor | None = None
    sites: dict[str, SiteTerm] | None = None


class SAERegGPT2LMHeadModel(Adapted, SitedGPT2LMHeadModel):
    """GPT-2 with one sparse autoencoder on each of some residual-stream sites.

    Starts without heads: `attach_heads` adds them, `from_pretrained` loads saved ones.
    """

    # buffers in checkpoints that old versions of transformers wrote
    _keys_to_ignore_on_load_unexpected = ("attn.bias", "attn.masked_bias", "crossattention.bias")

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the names of its own classes
        self.heads = HeadBank()
        self.term = TermOptions()  # how the term is computed in training
        self.skip = SkipOptions()  # which tokens are not read, beside padding

    def attach_heads(
        self, configs: Iterable[SAEHeadConfig], term: TermOptions | None = None
    ) -> None:
        """Put freshly initialised heads on the stream, in place of those that were there.

        Args:
            configs: one a site.
            term: how their term is computed in training; on all tokens and sites by default.

        Raises:
            HeadConfigError: if a site or width is not this model's, a head cannot be made, or
                `term` asks for more sites than there are.
        """
        self.place_heads(make_head(config) for config in configs)
        if term is not None:
            term.check_sites(len(self.heads))
            self.term = term

    def place_heads(self, heads: Iterable[SAEHead]) -> None:
        """Put these heads on the stream, in place of those that were there.

        Args:
            heads: one a site, in stream order; from wherever they come.

        Raises:
            HeadConfigError: if a site or width is not this model's, two heads sit on one site, or
                they skip different tokens.
        """
        bank = HeadBank(heads)
        for config in bank.configs:
            if config.hook_name not in self.hook_names:
                raise HeadConfigError(
                    f"Unknown hook name {config.hook_name!r}; "
                    f"this model has {', '.join(self.hook_names)}."
                )
            if config.d_in != self.config.n_embd:
                raise HeadConfigError(
                    f"The head on {config.hook_name} reads {config.d_in} dimensions, "
                    f"the model's stream has {self.config.n_embd}."
                )
            if config.skip != bank.configs[0].skip:
                raise HeadConfigError(
                    f"The head on {config.hook_name} has {config.skip_in_words}, that on "
                    f"{bank.configs[0].hook_name} {bank.configs[0].skip_in_words}; give all heads "
                    "of a model the same."
                )
        if bank:
            self.skip_over(bank.configs[0])
        self.heads = bank.to(self.device).train(self.training)

    def skip_over(self, options: SkipOptions) -> None:
        """Leave these tokens out wherever activations are read or replaced, from here on.

        Args:
            options: in place of those of the heads, which do this where they are placed.

        Raises:
            HeadConfigError: if the model has no such tokens.
        """
        options.check_vocabulary(self.config.vocab_size)
        self.skip = options.skip

    def token_mask(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """(batch, sequence) bool, true where a token is read; None where all are.

        Args:
            inputs: `input_ids`, and `attention_mask` where there is padding.
        """
        return token_mask(self.skip, inputs["input_ids"], inputs.get("attention_mask"))

    def token_count(self, inputs: Mapping[str, Tensor]) -> int:
        """How many tokens of a batch are read.

        Args:
            inputs: as `token_mask` takes them.
        """
        return tokens_read(inputs["input_ids"], self.token_mask(inputs)).numel()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        compute_term: bool | None = None,
        term_step: int = 0,
        term_draw: int = 0,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> SAERegOutput:
        """GPT-2's forward pass, and the term of its heads.

        Args:
            input_ids: (batch, sequence).
            attention_mask: (batch, sequence), 0 at padding, which no head sees; left or right.
            labels: (batch, sequence), shifted inside, -100 where there is nothing to predict.
            compute_term: whether to run the heads; by default where there are labels and heads.
            term_step: step of the training, the same on all processes: on it depends, in training
                mode, which sites the term covers and which are spliced.
            term_draw: of the micro-batch and process: on it too depends which tokens are drawn.
            position_ids: (batch, sequence) or (1, sequence); by default counted from the first
                token, cached or not, padding too. `generate` counts from the mask instead, but
                only for a model whose signature has this.
            logits_to_keep: compute the logits of this many last tokens, or of the positions in a
                (kept,) tensor; 0 for all, which a loss needs. `generate` asks for the last one's.
            **kwargs: as `GPT2LMHeadModel` takes them.

        Raises:
            ValueError: if the term is asked for with a mask that is not (batch, sequence).
            HeadConfigError: if it skips token ids, and was given embeddings in their place.
        """
        if compute_term is None:
            compute_term = labels is not None and len(self.heads) > 0
        read = self.heads.hook_names if compute_term else []
        if self.training:
            read = self.term.sites_of_step(read, term_step)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        with self.reading(read) as activations:
            output = super().forward(**inputs)
        if not read:
            return SAERegOutput(**output)
        if input_ids is None and self.skip.skip_tokens:
            raise HeadConfigError(
                f"skip_tokens is {self.skip.skip_tokens}, but the model was given embeddings; give "
                "it input_ids, or heads that skip no token by its id."
            )
        ids = activations[read[0]][..., 0] if input_ids is None else input_ids
        mask = self.token_mask({"input_ids": ids, "attention_mask": attention_mask})
        kept = None
        if self.training:
            tokens = activations[read[0]][..., 0].numel() if mask is None else int(mask.sum())
            kept = random_tokens(tokens, self.term.token_fraction, (term_step, term_draw))
        with self._autocast_of_term(activations[read[0]].device):
            term, sites = regularization(self.heads, activations, mask, kept)
        spliced_loss = None
        if self.training and self.term.splice_weight > 0:
            spliced_loss = self._spliced_loss(term_step, mask, output.logits, inputs)
        return SAERegOutput(**output, term=term, spliced_loss=spliced_loss, sites=sites)

    def _autocast_of_term(self, device: torch.device) -> AbstractContextManager:
        if self.training and self.term.term_bf16:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    def _spliced_loss(
        self, step: int, mask: Tensor | None, plain_logits: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        hook_names = self.term.spliced_sites(self.heads.hook_names, step)
        splices = {hook_name: Splice(self.heads[hook_name], mask) for hook_name in hook_names}
        with self.at_sites(splices), _without_checkpointing(self.transformer.h):
            output = super().forward(**inputs)
        if self.term.splice_loss == "ce":
            return output.loss
        number = inputs.get("num_items_in_batch")
        return kl_of_predictions(plain_logits, output.logits, inputs["labels"], number)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        head_metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a plain GPT-2 checkpoint, or the adapter alone, and the heads below `saes/`.

        Args:
            save_directory: folder; created if absent.
            is_main_process: only the main process writes.
            state_dict: full state dictionary of this model, where it was gathered from shards.
            push_to_hub: publish the folder afterwards, as `repo_id`, by default its own name.
            head_metadata: goes into every head's metadata: `dataset_path`, `model_name`, …
            **kwargs: as `PreTrainedModel.save_pretrained` takes them; with `push_to_hub` also those
                of `PushArguments`.

        Raises:
            HeadConfigError: if a head has no form on disk.
            HubError: with `push_to_hub`, if the Hub cannot be reached or refuses.
        """
        check_savable(self.heads)  # or the language model would be written and its heads lost
        repo_id = kwargs.pop("repo_id", Path(save_directory).absolute().name)
        options = [option.name for option in fields(PushArguments)] if push_to_hub else []
        options = {name: kwargs.pop(name) for name in options if name in kwargs}
        heads = self.heads
        if state_dict is not None:
            own = {
                k.removeprefix("heads."): v for k, v in state_dict.items() if k.startswith("heads.")
            }
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith("heads.")}
            heads = heads.with_state(own) if own else heads
        save = super().save_pretrained if self.has_adapters else self.plain_view().save_pretrained
        save(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        if is_main_process:
            metadata = {"context_size": self.config.n_positions, **(head_metadata or {})}
            save_heads(heads, Path(save_directory), metadata)
            if push_to_hub:
                publish(save_directory, repo_id, PushArguments(**options))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        head_metadata: dict[str, Any] | None = None,
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> CommitInfo:
        """Publish the language model as a plain GPT-2, and its heads.

        Args:
            repo_id: `user/name`, or `name` in one's own namespace; made if it does not exist.
            head_metadata: as `save_pretrained` takes it.
            max_shard_size: larger weights are cut into files of this size.
            **options: as `PushArguments` has them: `private`, `revision`, `commit_message`, …

        Returns:
            The commit; as text its address.

        Raises:
            HubError: if the Hub cannot be reached or refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, head_metadata=head_metadata, max_shard_size=max_shard_size)
            return publish(folder, repo_id, PushArguments(**options))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        heads: Sequence[SAEHeadConfig] | None = None,
        hook_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> "SAERegGPT2LMHeadModel | tuple[SAERegGPT2LMHeadModel, dict[str, Any]]":
        """Load any GPT-2 checkpoint, with its heads if it has some.

        Args:
            pretrained_model_name_or_path: folder or Hub repository.
            *model_args: as `PreTrainedModel.from_pretrained` takes them.
            heads: attach fresh heads like these where none are saved; where some are, they must be
                like these.
            hook_names: load the saved heads on these sites only; of a repository no others are
                downloaded.
            **kwargs: as `PreTrainedModel.from_pretrained` takes them.

        Returns:
            The model, with `output_loading_info=True` a pair as `transformers` returns it.

        Raises:
            CheckpointError: if it is no GPT-2 in safetensors, or a weight is not finite.
            HeadFolderError: if saved heads are missing, damaged, or not what `heads` describes.
            HeadConfigError: if heads do not fit the model.
            HubError: if the Hub cannot be reached, refuses, or has no such repository or revision.
        """
        name = pretrained_model_name_or_path
        options = {option: kwargs.pop(option) for option in HUB_OPTIONS if option in kwargs}
        subfolder = kwargs.pop("subfolder", "")
        checkpoint = find_checkpoint(name, subfolder, hook_names, **options)
        kwargs["use_safetensors"] = True
        if not (checkpoint / MODEL_CONFIG).is_file():  # an adapter, whose base is found like it
            kwargs |= {k: v for k, v in options.items() if k != "revision"}
        try:
            loaded = super().from_pretrained(checkpoint, *model_args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights of {name} (model.safetensors) are damaged ({error}); fetch or save "
                "them again."
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = str(name)
        model._check_finite(name)
        if saved_hook_names(checkpoint) if hook_names is None else hook_names:
            model.load_heads(checkpoint, heads, hook_names)
        elif heads is not None:
            model.attach_heads(heads)
        return loaded

    @classmethod
    def load_whole(cls, name: str | Path, **options: Any) -> Self:
        """As `from_pretrained`, of a checkpoint that lacks no weight: none is drawn at random.

        Args:
            name: folder or Hub repository.
            **options: as `from_pretrained` takes them, but `output_loading_info`.

        Raises:
            UserError: as `from_pretrained`; a `CheckpointError` also if it lacks a weight.
        """
        model, loading = cls.from_pretrained(name, output_loading_info=True, **options)
        if loading["missing_keys"]:
            raise CheckpointError(
                f"{name} lacks weights, {sorted(loading['missing_keys'])[0]} among them; it was "
                "not saved from a whole GPT-2 language model."
            )
        return model

    def _check_finite(self, name: str | Path) -> None:
        for parameter_name, parameter in self.named_parameters():
            if not parameter.is_meta and not parameter.isfinite().all():
                raise CheckpointError(
                    f"The weights of {name} have NaN or infinity in {parameter_name}; "
                    "load another checkpoint."
                )

    def load_heads(
        self,
        checkpoint: Path,
        expected: Sequence[SAEHeadConfig] | None = None,
        hook_names: Sequence[str] | None = None,
    ) -> None:
        """Put the heads saved in a checkpoint on the stream, in place of those that were there.

        Args:
            checkpoint: folder that holds `saes/`.
            expected: what the saved heads must be like.
            hook_names: load those on these sites only.

        Raises:
            HeadFolderError: if a folder is missing or damaged, or the heads are not what is
                expected.
            HeadConfigError: if a head does not fit this model.
        """
        if hook_names is None:
            hook_names = saved_hook_names(checkpoint)
        loaded = [load_head(checkpoint, hook_name) for hook_name in hook_names]
        if expected is not None:
            check_matches([head.config for head in loaded], expected)
        order = {hook_name: i for i, hook_name in enumerate(self.hook_names)}
        loaded.sort(key=lambda head: order.get(head.config.hook_name, -1))
        self.place_heads(loaded)


@contextmanager
def _without_checkpointing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """No gradient checkpointing inside: what it computes again would lack the splices."""
    checkpointed = [block for block in blocks if block.gradient_checkpointing]
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        yield
    finally:
        for block in checkpointed:
            block.gradient_checkpointing = True
