"""FLOPs on paper against those that torch counts."""

import json

import pytest
import torch
import yaml
from test_report import SITES, make_results
from tiny_recipe import configuration
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from hf_saereg.flops import gpt2_flops, head_flops
from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.report import read_results
from hf_saereg.report.training_files import read_trainings
from hf_saereg.study import Study
from hf_saereg.study_settings import settings_of


@pytest.mark.parametrize("inner", [None, 80])
def test_those_of_a_gpt2_are_those_that_torch_counts(inner):
    config = GPT2Config(
        **{"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": 100},
        n_inner=inner,
        attn_implementation="eager",
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    )
    tokens = torch.randint(config.vocab_size, (2, config.n_positions))
    model = GPT2LMHeadModel(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    assert counter.get_total_flops() == tokens.numel() * gpt2_flops(config.to_dict())


def test_those_of_a_dense_head_are_those_that_torch_counts():
    head = make_head(SAEHeadConfig("topk", "blocks.0.hook_resid_pre", 32, 96, k=4))
    head.kernel = "dense"
    x = torch.randn(40, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        losses = head.losses(x)
        (losses.reconstruction + losses.sparsity).backward()
    assert counter.get_total_flops() == len(x) * head_flops(32, 96)


def test_past_the_encoder_a_sparse_head_costs_its_active_latents():
    assert head_flops(32, 96, 96) == head_flops(32, 96)
    assert head_flops(32, 96, 0) == head_flops(32, 96) / 6


@pytest.mark.parametrize(
    ("options", "passes", "share"),
    [
        ({}, 1, 1.0),
        ({"token_fraction": 0.25}, 1, 0.25),
        ({"token_fraction": 0.25, "sites_per_step": 1}, 1, 0.05),
        ({"token_fraction": 0.25, "splice_weight": 0.5}, 2, 1.25),
        ({"token_fraction": 0.25, "splice_weight": 0.5, "splice_sites": 2}, 2, 0.65),
    ],
)
def test_a_comparisons_page_counts_what_a_step_trains(tmp_path, options, passes, share):
    config = {"n_embd": 16, "n_layer": 4, "vocab_size": 128, "n_positions": 32}
    for model in ("plain", "regularized"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text(json.dumps(config))
    for site in SITES:
        folder = tmp_path / "regularized" / "saes" / site
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text(json.dumps({"d_in": 16, "d_sae": 64}))
    results = read_results(make_results())
    assert read_trainings(tmp_path, results).regularized.flops is None  # nobody says what it took
    (tmp_path / "run.json").write_text(json.dumps({"options": options}))
    plain, regularized = (own.flops for own in read_trainings(tmp_path, results))
    assert plain == (gpt2_flops(config), 0, 0)
    assert regularized.language == passes * gpt2_flops(config)
    assert regularized.heads_dense == pytest.approx(share * len(SITES) * head_flops(16, 64))
    sparse = sum(head_flops(16, 64, results.cotrained_l0(site) or 0.0) for site in SITES)
    assert regularized.heads_sparse == pytest.approx(share * sparse)


def test_a_studys_variants_cost_what_they_train(tmp_path):
    base = configuration(tmp_path, d_sae=[32])
    variants = {
        "plain": {"model": "plain"},
        "all": {},
        "half": {"token_fraction": 0.5},
        "spliced": {"splice_weight": 1.0},
        "untrained": {"model": "untrained"},
    }
    content = {"base": base.name, "seeds": [0], "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    settings = settings_of(Study.read(tmp_path / "study.yaml"))
    plain, whole, half, spliced, untrained = (own["flops_per_token"] for own in settings.values())
    heads = whole - plain
    assert heads > 0 and heads % head_flops(1, 32) == 0
    assert half == plain + heads / 2
    assert spliced == 2 * whole
    assert untrained == 0
