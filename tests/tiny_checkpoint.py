"""A GPT-2 that stock `transformers` saved, and a text that it can read."""

import json
import random

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

WORDS = ["the", "king", "shall", "speak", "to", "all", "his", "men", "and", "queens", "hear", "it"]
SITES = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]


def write_text(path, words=1500):
    choose = random.Random(0).choice
    path.write_text(" ".join(choose(WORDS) for _ in range(words)))
    return path


def save_stock_model(folder, seed=0, **changes):
    """Two blocks of width 16 on characters, without a tokenizer."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 128}
    config = GPT2Config(
        **(shape | changes),
        initializer_range=0.2,
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    )
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


OFFICIAL_CONFIG = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def save_official_layout(folder, tokenizer, seed=0, **shape):
    """A GPT-2 with random weights in the files that `openai-community/gpt2` has.

    Those of `write_official_weights`, and the true tokenizer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    write_official_weights(
        folder, GPT2LMHeadModel(GPT2Config(**(OFFICIAL_CONFIG | shape))), **shape
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 50256, "eos_token_id": 50256})
    )
    tables = json.loads((tokenizer / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tables))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    (folder / "vocab.json").write_text(json.dumps(tables["model"]["vocab"]))
    merges = (
        pair if isinstance(pair, str) else " ".join(pair) for pair in tables["model"]["merges"]
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


def write_official_weights(folder, model, **shape):
    """Configuration and weights of a model as `openai-community/gpt2` has them.

    Tensors without the prefix `transformer.`, no output layer (it is the embedding), and the causal
    masks of old versions among them; every key of the configuration.
    """
    config = OFFICIAL_CONFIG | shape
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {
        name.removeprefix("transformer."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head.")
    }
    size = config["n_positions"]
    for i in range(config["n_layer"]):
        tensors[f"h.{i}.attn.bias"] = torch.ones(size, size).tril().view(1, 1, size, size)
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
