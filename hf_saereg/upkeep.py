"""What happens to trained heads around optimizer steps: where they start, what they saw, new lives.

Notable:
- heads see what the tokens of all processes did: dead latents are counted and coefficients steered
  alike everywhere
"""

from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from hf_saereg.corpora import first_rows
from hf_saereg.errors import UserError
from hf_saereg.heads.health import centre, forget, resample
from hf_saereg.heads.tokens import tokens_read
from hf_saereg.positions import language_inputs
from hf_saereg.regularizer import SiteTerm
from hf_saereg.training_arguments import SAERegArguments


class HeadUpkeep(TrainerCallback):
    """Called back where the loop of a `Trainer` has no method to override.

    Args:
        trainer: of a model with heads.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # per site, of the micro-batches since the last optimizer step: fired, tokens
        self._unobserved: dict[str, tuple[Tensor, Tensor]] = {}
        self._last_inputs: dict[str, Any] = {}

    def remember(self, inputs: dict[str, Any], sites: dict[str, SiteTerm]) -> None:
        """Keep what a micro-batch did until its optimizer step is over.

        Args:
            inputs: of the model.
            sites: what the heads made of them, by hook name.
        """
        self._last_inputs = inputs
        for hook_name, site in sites.items():
            seen = (site.losses.statistics.fired, site.losses.statistics.tokens)
            if hook_name in self._unobserved:
                seen = tuple(map(torch.add, self._unobserved[hook_name], seen))
            self._unobserved[hook_name] = seen

    def figures(self) -> dict[str, float]:
        """By `NAME/HOOK_NAME`: coefficient, dead latents, and whether a kernel skips idle latents.

        A latent is dead by the tokens since it last fired; `sparse_kernel` is 0 or 1.
        """
        figures = {}
        for head in self.trainer.model.heads:
            figures[f"coefficient/{head.config.hook_name}"] = float(head.coefficient)
            figures[f"dead_fraction/{head.config.hook_name}"] = head.dead.double().mean().item()
            figures[f"sparse_kernel/{head.config.hook_name}"] = float(head.skips_idle_latents)
        return figures

    def on_train_begin(
        self, args: SAERegArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start `b_dec` in the middle of the first training rows, unless the run is resumed."""
        if state.global_step == 0 and args.b_dec_init != "zero":
            self._initialise_biases(args)

    def on_optimizer_step(
        self, args: SAERegArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the heads see what all processes' tokens did in the step that is over."""
        seen, self._unobserved = self.trainer.accelerator.reduce(self._unobserved), {}
        for head in self.trainer.model.heads:
            if head.config.hook_name in seen:
                head.observe(*seen[head.config.hook_name])
        step = state.global_step + 1
        if args.resample_every and step % args.resample_every == 0:
            self._resample(step)

    def _resample(self, step: int) -> None:
        tokens = self.trainer.model.token_count(self._last_inputs)
        if not broadcast(torch.tensor(tokens, device=self.trainer.args.device)):
            return  # the main process's latents are those of all, and it has no token to aim at
        activations = self._activations(self._last_inputs)
        optimizer = self.trainer.optimizer.optimizer
        generator = torch.Generator().manual_seed(step)
        for head in self.trainer.model.heads:
            if tokens:
                resample(head, activations[head.config.hook_name], generator, optimizer)
            else:  # what the others start anew is new here, too
                forget(head, head.dead.nonzero().squeeze(1), optimizer)
            for parameter in head.parameters():  # every process has other tokens
                parameter.data = broadcast(parameter.data)

    def _initialise_biases(self, args: SAERegArguments) -> None:
        for head in self.trainer.model.heads:
            if head.b_dec.any():
                raise UserError(
                    f"b_dec_init is {args.b_dec_init}, but the head at {head.config.hook_name} has "
                    "a trained b_dec already; leave b_dec_init out."
                )
        rows = first_rows(self.trainer.train_dataset, args.b_dec_init_rows)
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
        for hook_name, x in self._activations(inputs).items():
            head = self.trainer.model.heads[hook_name]
            read = head.normalise(x.to(head.W_dec.dtype)).x
            head.b_dec.data.copy_(centre(read, args.b_dec_init))

    @torch.no_grad()
    def _activations(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """(tokens, d_in) by hook name, of the tokens that are read."""
        model = self.trainer.model
        with model.reading(model.heads.hook_names) as activations:
            model.transformer(**language_inputs(inputs), use_cache=False)
        mask = model.token_mask(inputs)
        return {hook_name: tokens_read(x, mask) for hook_name, x in activations.items()}
