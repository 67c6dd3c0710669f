"""Our checkpoint in TransformerLens: the activations that we read, and the price of a splice."""

import pytest
import torch
from conftest import SITES
from transformers import GPT2LMHeadModel

from hf_saereg.corpora import character_tokenizer
from hf_saereg.fidelity import baselines, fidelity

model_bridge = pytest.importorskip(
    "transformer_lens.model_bridge",
    reason="transformer-lens is not installed: the extra [interop]",
)


@pytest.fixture
def saved(model, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    character_tokenizer(32).save_pretrained(folder)
    return folder


@pytest.fixture
def bridge(saved):
    hf_model = GPT2LMHeadModel.from_pretrained(saved, attn_implementation="eager")
    return model_bridge.TransformerBridge.boot_transformers(str(saved), hf_model=hf_model)


def test_activations_and_logits_are_ours(model, bridge, input_ids):
    with torch.no_grad(), model.reading(SITES) as ours:
        logits = model(input_ids).logits
        theirs, cache = bridge.run_with_cache(input_ids)
    torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-4)
    for hook_name in SITES:
        torch.testing.assert_close(cache[hook_name], ours[hook_name], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty")
def test_sae_spliced_there_costs_what_it_costs_here(model, saved, bridge, input_ids):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    batches = [{"input_ids": input_ids, "labels": input_ids}]
    with torch.no_grad():
        base = baselines(model, batches)
        ours = fidelity(model, model.heads, batches, base)
        clean = bridge(input_ids, return_type="loss", prepend_bos=False)
        assert abs(clean.item() - base.clean_ce) < 1e-3
        for hook_name in SITES:
            sae = sae_lens.SAE.load_from_disk(saved / "saes" / hook_name)
            loss = bridge.run_with_hooks(
                input_ids,
                return_type="loss",
                fwd_hooks=[(hook_name, lambda x, hook, sae=sae: sae(x))],
            )
            increase = (loss - clean).item()
            assert abs(increase - ours.sites[hook_name].effect.ce_increase) < 1e-3
            assert abs(increase) > 2e-3  # it costs something, so the comparison can fail


def test_character_tokenizer_works_there(bridge):
    assert bridge.to_tokens("To be", prepend_bos=False).tolist() == [[84, 111, 32, 98, 101]]
    assert bridge.to_string(torch.tensor([84, 111])) == "To"
