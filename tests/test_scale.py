"""The cost model against torch, accelerate and measured points, and the document against it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import scale_check
from benchmarks.scale import (
    GB,
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
from hf_saereg import eager_gradients, flops
from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.modeling import SAERegGPT2LMHeadModel

DOCUMENT = Path(__file__).parents[1] / "benchmarks" / "scale.md"
TINY = Language("tiny", 3, 32, 16, 100, 128)


def gpt2(language, of=GPT2LMHeadModel, **options):
    return of(
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


def total(step):
    return sum(step.memory().values())


def test_gradients_of_own_tokens_are_not_shared_out_with_the_heads():
    language = LANGUAGES[3]
    for gpus in (8, 64):
        few = Step(language, heads_of(language), gpus, shard=True, shard_heads=True)
        many = replace(few, micro=2 * few.micro)
        more = many.memory()["heads"] - few.memory()["heads"]
        assert more == 2 * few.micro * 32 * 4096


def test_a_reference_is_whole_on_every_gpu():
    small, xl, seven = LANGUAGES[0], LANGUAGES[2], LANGUAGES[3]
    for language in LANGUAGES:
        for gpus in (1, 8, 64):
            step = step_of(language, gpus)
            more = total(replace(step, reference=True)) - total(step)
            assert more == pytest.approx(4 * language.parameters)
    assert fits(replace(step_of(small, 1), reference=True))
    assert fits(replace(step_of(xl, 8), reference=True))
    on_eight = replace(step_of(seven, 8), reference=True)
    fewer = replace(on_eight, micro=4096)
    assert not fits(on_eight) and fits(fewer) and round(total(fewer) / GB) == 68


def test_one_gpu_holds_gpt2_xl_with_half_the_tokens_at_once():
    step = step_of(LANGUAGES[2], 1)
    fewer = replace(step, micro=4096)
    assert not fits(step) and fits(fewer) and round(total(fewer) / GB) == 70
    assert not fits(replace(fewer, reference=True))


def test_heads_that_stay_whole_are_gathered_once_and_fit_no_number_of_gpus():
    language = LANGUAGES[3]
    heads = heads_of(language)
    sharded = Step(language, heads, 8, shard=True, shard_heads=True, checkpointing=True)
    today = replace(sharded, shard_heads=False)
    assert sharded.traffic() - today.traffic() == 7 / 8 * 8 * 2 * heads.parameters
    sizes = [round(total(replace(today, gpus=gpus)) / GB) for gpus in (8, 64)]
    many = replace(today, gpus=10**6)
    assert sizes == [110, 83] and not fits(many) and 79 < total(many) / GB < 80


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shards",))
    dist.destroy_process_group()


def test_accelerate_holds_whole_for_a_step_what_the_model_on_paper_does(one_process, monkeypatch):
    language = replace(TINY, n_layer=2)
    model = gpt2(language, SAERegGPT2LMHeadModel)
    hook_names = model.hook_names[:2]
    model.attach_heads([SAEHeadConfig("topk", name, 32, 96, k=4) for name in hook_names])
    for head in model.heads:
        head.kernel = "dense"  # see tests/fsdp_job.py
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # set for good else
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh=one_process,
        parallelism_config=SimpleNamespace(fsdp_dim_names=("shards",)),
    )
    fsdp2_prepare_model(accelerator, model)
    waiting = []
    apply = eager_gradients._Known.apply

    def spy(value, gradients, *inputs):
        waiting.extend(gradients)
        return apply(value, gradients, *inputs)

    monkeypatch.setattr(eager_gradients._Known, "apply", spy)
    tokens = torch.randint(language.vocabulary, (2, language.context))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, labels=tokens)

    whole = {n: p for n, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert {p.dtype for p in whole.values()} == {torch.bfloat16}
    weights = {n: p.numel() for n, p in whole.items() if p.dim() == 2}
    of_heads = [n for n in weights if n.startswith("heads.")]
    assert sum(weights.pop(n) for n in of_heads) == Heads(2, 32, 96, 4).parameters
    assert sum(weights.values()) == language.outermost
    # of each head four parameters and the tokens, which neither precision nor sharding spares
    assert len(waiting) == 10 and {gradient.dtype for gradient in waiting} == {torch.bfloat16}
    assert sum(g.numel() == tokens.numel() * 32 for g in waiting) == 2
    (output.loss + output.term).backward()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


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


TABLES = (model_table, step_table, scale_check.time_table, scale_check.memory_table)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_document_has_the_tables_that_the_commands_print(table):
    assert "\n".join(table()) in DOCUMENT.read_text()


@pytest.mark.parametrize("name", scale_check.TIMES)
def test_heads_add_what_flops_say_within_the_documents_bounds(name):
    results = scale_check.read(name)
    for sparse, bound in ((False, scale_check.DENSE_WITHIN), (True, scale_check.SPARSE_WITHIN)):
        assert 1 / bound < scale_check.off_by(results, sparse) < bound


def test_ratios_are_those_of_the_measured_shape():
    results = scale_check.read("gpt2_small")
    # 256 tokens a sequence, not the 1,024 of a full context
    plain = 3 * (2 * (12 * 12 * 768**2 + 50257 * 768) + 4 * 12 * 768 * 256)
    dense = 13 * 2 * 768 * 6 * 6144
    assert scale_check.ratio_on_paper(results, sparse=False) == pytest.approx(1 + dense / plain)
    sites = results["stages"]["late"]["sites"].values()
    sparse = sum(2 * 768 * (6144 + 5 * site["l0"]) for site in sites)
    assert scale_check.ratio_on_paper(results, sparse=True) == pytest.approx(1 + sparse / plain)
    paths = results["stages"]["late"]["paths"]
    for is_sparse, path in ((False, "dense"), (True, "sparse")):
        seconds = paths[path]["seconds"] / paths["plain"]["seconds"]
        assert scale_check.measured_ratio(results, is_sparse) == pytest.approx(seconds)
    encoders = (paths["floor"]["ratio_to_plain"] - 1, dense / 6 / plain)
    assert [f"{share:.0%}" for share in encoders] == ["6%", "16%"]


def test_measured_memory_is_above_the_computed_sum_and_within_the_documents_bound():
    step = scale_check.FULL_SIZE
    measured = scale_check.read("full_size")["peak_gib"] * scale_check.GIB
    assert 1 < measured / total(step) < scale_check.MEMORY_WITHIN
    sizes = [total(replace(step, micro=micro)) / scale_check.GIB for micro in (1024, 4096)]
    assert [f"{size:.1f}" for size in sizes] == ["5.4", "7.9"]


def test_the_document_names_the_bounds():
    text = " ".join(DOCUMENT.read_text().split())
    dense, sparse = scale_check.DENSE_WITHIN, f"{scale_check.SPARSE_WITHIN:.0f}"
    assert f"within a factor of {dense} either way, for sparse ones within {sparse} only" in text
    assert f"is within {scale_check.MEMORY_WITHIN} times the sum, never below it" in text
