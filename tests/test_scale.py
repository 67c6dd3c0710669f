"""The cost model against what torch counts, and the document against the cost model."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.scale import (
    LANGUAGES,
    Heads,
    Language,
    Step,
    fits,
    heads_of,
    model_table,
    step_of,
    step_table,
)
from hf_saereg.heads import SAEHeadConfig, make_head

DOCUMENT = Path(__file__).parents[1] / "benchmarks" / "scale.md"
TINY = Language("tiny", 3, 32, 16, 100, 128)


def gpt2(language, **options):
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=language.n_layer,
            n_head=4,
            n_embd=language.d_in,
            n_positions=language.context,
            vocab_size=language.vocabulary,
            attn_implementation="eager",
            **dict.fromkeys(("bos_token_id", "eos_token_id")),
            **options,
        )
    )


@pytest.mark.parametrize("language", LANGUAGES[:3], ids=lambda language: language.name)
def test_parameters_are_those_of_the_model(language):
    with torch.device("meta"):
        model = gpt2(language)
    exact = sum(parameter.numel() for parameter in model.parameters())
    assert language.parameters == pytest.approx(exact, rel=0.002)


def test_flops_of_the_language_model_are_those_that_torch_counts():
    tokens = torch.randint(TINY.vocabulary, (2, TINY.context))
    model = gpt2(TINY)
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, labels=tokens).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == tokens.numel() * TINY.forward_flops()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_flops_of_dense_heads_are_those_that_torch_counts():
    heads = Heads(sites=1, d_in=32, d_sae=96, l0=4)
    config = SAEHeadConfig("topk", "blocks.0.hook_resid_pre", heads.d_in, heads.d_sae, k=heads.l0)
    head = make_head(config)
    head.kernel = "dense"
    x = torch.randn(40, heads.d_in, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        losses = head.losses(x)
        (losses.reconstruction + losses.sparsity).backward()
    assert counter.get_total_flops() == len(x) * heads.step_flops(sparse=False)
    assert head.W_enc.numel() + head.W_dec.numel() == heads.parameters


def test_fewer_tokens_and_sites_cost_their_share():
    all_of_it = Heads(8, 32, 96, 4)
    part = Heads(8, 32, 96, 4, token_fraction=0.25, sites_per_step=2)
    for sparse in (False, True):
        assert part.step_flops(sparse) == all_of_it.step_flops(sparse) / 16


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_more_gpus_never_need_more_memory_each_and_send_nothing_when_alone(language):
    steps = [step_of(language, gpus) for gpus in (1, 8, 64)]
    sizes = [sum(step.memory().values()) for step in steps]
    assert sizes == sorted(sizes, reverse=True) and steps[0].traffic() == 0
    assert fits(steps[2])


def test_states_are_shared_out_and_heads_stay_whole_unless_sharded_themselves():
    language = LANGUAGES[2]
    heads = heads_of(language)
    whole, shared, sharded = (
        Step(language, heads, 8, shard=shard, shard_heads=own).memory()
        for shard, own in ((False, False), (True, False), (True, True))
    )
    assert whole["states"] == 16 * (language.parameters + heads.parameters)
    assert shared["states"] == whole["states"] / 8
    assert shared["heads"] > 6 * heads.parameters > sharded["heads"]


def test_the_document_has_the_tables_that_the_command_prints():
    text = DOCUMENT.read_text()
    for table in (model_table(), step_table()):
        assert "\n".join(table) in text
