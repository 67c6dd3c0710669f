"""The shapes that `benchmarks.step` measures: a language model, its heads, and a batch."""

from dataclasses import dataclass

import torch
from transformers import GPT2Config

from hf_saereg.configuration import DROPOUTS, gpt2_hook_names
from hf_saereg.corpora import CorpusArguments, character_tokenizer, load_blocks
from hf_saereg.heads import SAEHeadConfig


@dataclass(frozen=True)
class Shape:
    """A GPT-2 with standard heads on every site."""

    n_layer: int
    n_head: int
    d_in: int
    d_sae: tuple[int, ...]  # one a site
    vocabulary: int
    context: int
    tokens: int  # of a measured step
    cpu_tokens: int  # where there is no GPU
    training_tokens: int  # of a step of the run that makes the checkpoints
    training_steps: int
    activation: str = "gelu_new"

    def model_config(self) -> GPT2Config:
        """GPT-2 of this shape, without dropout."""
        return GPT2Config(
            vocab_size=self.vocabulary,
            n_positions=self.context,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.d_in,
            activation_function=self.activation,
            **dict.fromkeys(DROPOUTS, 0.0),
            **dict.fromkeys(("bos_token_id", "eos_token_id")),
        )

    def head_configs(self) -> list[SAEHeadConfig]:
        """A standard head a site; λ = 3 as published."""
        return [
            SAEHeadConfig("standard", hook_name, self.d_in, d_sae, 0.05, reconstruction_weight=3.0)
            for hook_name, d_sae in zip(gpt2_hook_names(self.n_layer), self.d_sae, strict=True)
        ]

    def batches(self, tokens: int) -> torch.Tensor:
        """The packaged plays, one character a token, in order: (batches, sequences, sequence)."""
        sequence = min(self.context, tokens)
        blocks = load_blocks(CorpusArguments(block_size=sequence), character_tokenizer(sequence))
        ids = blocks["train"].with_format("torch")[:]["input_ids"]
        sequences = tokens // sequence
        return ids[: len(ids) // sequences * sequences].view(-1, sequences, sequence)


def _character(*d_sae: int, training_steps: int = 150) -> Shape:
    # the activation as the character recipes compute it
    activation = "gelu_pytorch_tanh"
    return Shape(4, 4, 64, d_sae, 128, 128, 16384, 16384, 2048, training_steps, activation)


def _gpt2_small(d_sae: int, training_steps: int) -> Shape:
    # few tokens and steps on a CPU, where the optimizer alone moves gigabytes a step
    return Shape(12, 12, 768, (d_sae,) * 13, 50257, 1024, 8192, 256, 128, training_steps)


SHAPES = {
    "published": _character(512, 512, 2048, 4096, 4096, training_steps=300),
    "uniform512": _character(*(5 * [512])),
    "uniform4096": _character(*(5 * [4096])),
    "uniform8192": _character(*(5 * [8192])),
    "gpt2_small": _gpt2_small(6144, 40),
    "gpt2_small_32x": _gpt2_small(24576, 12),
}
