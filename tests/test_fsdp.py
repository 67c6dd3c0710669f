"""FSDP2: the model shards with its hooks and heads, and trains and saves as if it were whole."""

from pathlib import Path

import pytest
import torch
from fsdp_job import RATE, STEPS, fresh_adapter, fresh_model, losses, observe
from launching import launch_two
from safetensors.torch import load_file
from training_job import tiny_model
from transformers import GPT2LMHeadModel

from hf_saereg.modeling import SAERegGPT2LMHeadModel

pytestmark = pytest.mark.slow
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    tiny_model(seed=4).save_pretrained(folder / "base")
    launch_two(Path(__file__).parent / "fsdp_job.py", folder)
    return folder


@pytest.fixture(scope="module")
def unsharded():
    """The same steps in one process: the mean of both processes' losses."""
    model, found = fresh_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for step in range(STEPS):
        (first, seen), (second, also_seen) = (losses(model, step, rank) for rank in (0, 1))
        ((first + second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        observe(model, [seen, also_seen])
        found.append((first.item(), second.item()))
    return model, found


def test_losses_of_every_step_are_those_of_the_whole_model(folder, unsharded):
    both = [torch.load(folder / f"losses_{rank}.pt") for rank in (0, 1)]
    for ours, expected in zip(zip(*both, strict=True), unsharded[1], strict=True):
        assert ours == pytest.approx(expected, rel=1e-9)


def test_weights_and_counters_end_the_same(folder, unsharded):
    state, initial = torch.load(folder / "state.pt"), fresh_model().state_dict()
    expected = unsharded[0].state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, **CLOSE, msg=name)
    for name in ("transformer.h.1.mlp.c_fc.weight", "heads.blocks_0_hook_resid_pre.W_enc"):
        assert not torch.allclose(state[name], initial[name], atol=1e-4), name


def test_what_is_saved_is_a_plain_checkpoint_with_its_heads(folder, unsharded):
    checkpoint = folder / "checkpoint"
    stock, loading = GPT2LMHeadModel.from_pretrained(
        checkpoint, dtype=torch.float64, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    plain = unsharded[0].plain_view().state_dict()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(tensor, plain[name], **CLOSE, msg=name)
    for head in unsharded[0].heads:
        found = load_file(checkpoint / "saes" / head.config.hook_name / "sae_weights.safetensors")
        for name, tensor in head.saelens_weights().items():
            torch.testing.assert_close(found[name], tensor, **CLOSE, msg=name)


def test_a_saved_model_goes_back_into_shards(folder):
    state, again = (torch.load(folder / f"{name}.pt") for name in ("state", "again"))
    torch.testing.assert_close(again, state, rtol=0, atol=0)


def test_sharded_adapters_are_saved_and_merged_into_a_plain_gpt2(folder):
    model = fresh_adapter(folder / "base")
    (first, _), (second, _) = (losses(model, 0, rank) for rank in (0, 1))
    ((first + second) / 2).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE).step()
    saved = SAERegGPT2LMHeadModel.from_pretrained(folder / "adapter", dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], tensor, **CLOSE, msg=name)
    model.merge_and_unload()
    merged = SAERegGPT2LMHeadModel.from_pretrained(folder / "merged", dtype=torch.float64)
    assert merged.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, **CLOSE, msg=name)
    stock = GPT2LMHeadModel.from_pretrained(folder / "merged", dtype=torch.float64)
    for name, tensor in merged.plain_view().state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name
