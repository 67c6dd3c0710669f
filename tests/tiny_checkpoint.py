"""A GPT-2 that stock `transformers` saved, and a text that it can read."""

import random

import torch
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
