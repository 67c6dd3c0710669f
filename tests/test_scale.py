"""The cost model against what torch counts, and the document against the cost model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
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
from hf_saereg import flops
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


def test_a_language_model_costs_what_a_gpt2_of_its_shape_does():
    assert flops.PASSES * TINY.forward_flops() == flops.gpt2_flops(gpt2(TINY).config.to_dict())


def test_heads_have_as_many_weights_as_made_ones():
    heads = Heads(sites=1, d_in=32, d_sae=96, l0=4)
    head = make_head(SAEHeadConfig("topk", "blocks.0.hook_resid_pre", 32, 96, k=4))
    assert head.W_enc.numel() + head.W_dec.numel() == heads.parameters


def test_fewer_tokens_and_sites_cost_their_share():
    all_of_it = Heads(8, 32, 96, 4)
    part = Heads(8, 32, 96, 4, token_fraction=0.25, sites_per_step=2)
    for sparse in (False, True):
        assert part.step_flops(sparse) == all_of_it.step_flops(sparse) / 16


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_more_gpus_never_need_more_memory_each_and_send_nothing_when_alone(language):
    steps = [step_of(language, gpus) for gpus in (1, 8, 64)]
    # DDP's buckets are what more than one needs and a single one does not
    sizes = [sum(step.memory().values()) - step.memory().get("buckets", 0) for step in steps]
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


def test_shards_keep_whole_gradients_between_micro_batches_unless_told_otherwise():
    language = LANGUAGES[3]
    told = Step(language, heads_of(language), 8, shard=True, shard_heads=True)
    silent = replace(told, sync_each_batch=False)
    assert told.micro_batches == 8
    more = sum(silent.memory().values()) - sum(told.memory().values())
    assert more == 4 * told.parameters and not fits(replace(silent, checkpointing=True))
    assert silent.traffic() < told.traffic()
    one = replace(silent, gpus=64)
    assert one.micro_batches == 1 and "whole gradients" not in one.memory()


def test_the_document_has_the_tables_that_the_command_prints():
    text = DOCUMENT.read_text()
    for table in (model_table(), step_table()):
        assert "\n".join(table) in text
