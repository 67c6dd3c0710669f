"""Tiny models and inputs that several test files share."""

import math
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # read when Triton is imported, which the packages below do where they find it
    os.environ.setdefault("TRITON_INTERPRET", "1")

from loopback_hub import LoopbackHub
from transformers import GPT2Config

from hf_saereg.heads import SAEHeadConfig
from hf_saereg.modeling import SAERegGPT2LMHeadModel

# threads that wait for each other make tiny models ten times slower on a machine that is busy
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
SITES = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]


def load_parameters(head, parameters):
    """Give a head all its parameters; what else it keeps stays as it is."""
    assert parameters.keys() == dict(head.named_parameters()).keys()
    head.load_state_dict(parameters, strict=False)


@pytest.fixture(scope="session")
def parity_folder():
    """Numbers of the published code, in float64."""
    folder = Path(os.environ.get("PARITY_DIR", REPOSITORY.parent / "shared" / "parity"))
    if not folder.is_dir():
        pytest.skip(f"no parity numbers in {folder}; set PARITY_DIR to the folder that has them")
    return folder


@pytest.fixture
def config():
    """A GPT-2 of two blocks, with weights large enough for predictions that differ."""
    return GPT2Config(
        vocab_size=128,
        n_positions=32,
        n_layer=2,
        n_head=4,
        n_embd=16,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )


@pytest.fixture
def head_configs():
    """Two families and three sizes, one head a site."""
    return [
        SAEHeadConfig("standard", SITES[0], 16, 40, sparsity_coefficient=0.1),
        SAEHeadConfig("topk", SITES[1], 16, 96, k=5, reconstruction_weight=3.0),
        SAEHeadConfig("standard", SITES[2], 16, 24, 0.05, reconstruction_weight=0.5),
    ]


@pytest.fixture
def plain_model(config):
    torch.manual_seed(0)
    return SAERegGPT2LMHeadModel(config).eval()


@pytest.fixture
def model(plain_model, head_configs):
    plain_model.attach_heads(head_configs)
    return plain_model


@pytest.fixture
def input_ids():
    """(3, 10), without the padding token."""
    return torch.randint(1, 128, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hub():
    """A Hub on this machine."""
    with LoopbackHub() as running:
        yield running
    assert not running.tokens_at_storage, "a token was sent to where large files lie"
    assert not running.unknown, "the client asked for what this Hub does not speak"


@pytest.fixture
def by_hand():
    """GPT-2 written out, without padding: activations by site, and logits.

    `patches`, by hook name, replace the activations of their site; a site is recorded unpatched.
    """

    def forward(model, input_ids, patches=None):
        patches = patches or {}
        gpt2, sequence = model.transformer, input_ids.shape[1]
        causal = torch.ones(sequence, sequence).tril().bool()
        activations = {}

        def at_site(hook_name, x):
            activations[hook_name] = x
            return patches[hook_name](x) if hook_name in patches else x

        x = gpt2.wte.weight[input_ids] + gpt2.wpe.weight[:sequence]
        for i, block in enumerate(gpt2.h):
            x = at_site(f"blocks.{i}.hook_resid_pre", x)
            qkv = block.ln_1(x) @ block.attn.c_attn.weight + block.attn.c_attn.bias
            q, k, v = (
                part.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2)
                for part in qkv.chunk(3, dim=-1)
            )  # (batch, head, sequence, width of a head)
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
            mixed = (weights @ v).transpose(1, 2).flatten(-2)
            x = x + mixed @ block.attn.c_proj.weight + block.attn.c_proj.bias
            x = x + block.mlp(block.ln_2(x))
        x = at_site(f"blocks.{len(gpt2.h) - 1}.hook_resid_post", x)
        return activations, gpt2.ln_f(x) @ gpt2.wte.weight.T

    return forward


LONGEST = ("readme", "hub", "recipe", "benchmarks", "killed", "tour", "cards", "two_processes")


def pytest_collection_modifyitems(items):
    """Files that take longest first: one that begins at the end keeps all others waiting."""

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)
