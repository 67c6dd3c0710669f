import pytest

from hf_saereg.configuration import CharacterModelArguments, HeadsArguments, gpt2_hook_names
from hf_saereg.corpora import character_tokenizer
from hf_saereg.errors import UserError
from hf_saereg.heads import FAMILIES, make_head

PRE_0, PRE_1 = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"
POST = "blocks.1.hook_resid_post"


def test_sites_are_every_block_input_and_the_last_output():
    assert gpt2_hook_names(2) == [PRE_0, PRE_1, POST]
    assert gpt2_hook_names(1) == [PRE_0, "blocks.0.hook_resid_post"]
    assert len(gpt2_hook_names(12)) == 13


def test_one_value_serves_all_sites(config):
    configs = HeadsArguments(d_sae=[32], k=[4], reconstruction_weight=[2.0]).head_configs(config)
    assert [head.hook_name for head in configs] == [PRE_0, PRE_1, POST]
    assert {(head.d_in, head.d_sae, head.k) for head in configs} == {(16, 32, 4)}
    assert {head.reconstruction_weight for head in configs} == {2.0}
    assert {head.architecture for head in configs} == {"topk"}


def test_values_go_to_sites_in_stream_order(config):
    arguments = HeadsArguments(
        architecture="standard",
        d_sae=[8, 300, 17],
        sparsity_coefficient=[0.1, 0.2, 0.3],
        reconstruction_weight=[1.0, 2.0, 3.0],
    )
    assert [
        (head.d_sae, head.sparsity_coefficient, head.reconstruction_weight)
        for head in arguments.head_configs(config)
    ] == [(8, 0.1, 1.0), (300, 0.2, 2.0), (17, 0.3, 3.0)]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_one_target_serves_every_family(config, architecture):
    heads = HeadsArguments(architecture=architecture, d_sae=[32], target_l0=[4.0])
    for head in heads.head_configs(config):
        assert (head.k or head.target_l0) == 4
        assert (head.k is None) != (head.target_l0 is None)
        make_head(head)


@pytest.mark.parametrize("hook_names", [[POST, PRE_0], [PRE_0, POST]])
def test_subset_of_sites_takes_values_in_stream_order_however_it_is_listed(config, hook_names):
    configs = HeadsArguments(hook_names=hook_names, d_sae=[8, 9], k=[2]).head_configs(config)
    assert [(head.hook_name, head.d_sae) for head in configs] == [(PRE_0, 8), (POST, 9)]


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"hook_names": ["blocks.2.hook_resid_pre"]}, "blocks.2.hook_resid_pre"),
        ({"hook_names": ["blocks.0.hook_resid_post"]}, "blocks.0.hook_resid_post"),
        ({"hook_names": ["blocks.0.hook_mlp_out"]}, "blocks.0.hook_mlp_out"),
        ({"hook_names": [PRE_0, PRE_0]}, "each site once"),
        ({"hook_names": []}, "at least one site"),
        ({"d_sae": [32, 32]}, "d_sae has 2 values for 3 sites"),
        ({"d_sae": []}, "d_sae has 0 values for 3 sites"),
        ({"d_sae": [32] * 4}, "d_sae has 4 values for 3 sites"),
        ({"d_sae": [32, 0, 32]}, f"d_sae at {PRE_1} is 0"),
        ({"d_sae": [-1]}, f"d_sae at {PRE_0} is -1"),
        ({"k": [1, 2]}, "k has 2 values for 3 sites"),
        ({"reconstruction_weight": [-1.0]}, "reconstruction_weight"),
        ({"reconstruction_weight": [float("nan")]}, "reconstruction_weight"),
        (
            {"architecture": "gated", "k": None, "sparsity_coefficient": [0.1, -0.1, 0.1]},
            f"sparsity_coefficient at {PRE_1} is -0.1",
        ),
        ({"architecture": "gated", "k": None}, "how sparse the gated heads shall be"),
        ({"architecture": "standard"}, "standard heads do not read k; take it out"),
        ({"architecture": "jumprelu", "target_l0": [4.0]}, "jumprelu heads do not read k"),
        ({"sparsity_coefficient": [0.1]}, "topk heads do not read sparsity_coefficient"),
        (
            {"architecture": "batchtopk", "sparsity_coefficient": [0.1]},
            "of the YAML file too, and give target_l0, which every family reads, or k",
        ),
        ({"k": None, "target_l0": [2.5]}, "a whole number"),
        ({"architecture": "relu"}, "Unknown architecture 'relu'"),
    ],
)
def test_bad_option_is_named_in_one_sentence(config, options, culprit):
    with pytest.raises(UserError) as caught:
        HeadsArguments(**{"k": [4], **options}).head_configs(config)
    message = str(caught.value)
    assert culprit in message
    assert message.endswith(".")
    assert "\n" not in message


def test_character_model_has_one_embedding_a_character_and_the_context_of_a_block():
    tokenizer = character_tokenizer(64)
    arguments = CharacterModelArguments(n_layer=3, n_head=2, n_embd=10, dropout=0.25)
    config = arguments.config(64, tokenizer)
    assert (config.vocab_size, config.n_positions) == (128, 64)
    assert (config.n_layer, config.n_head, config.n_embd) == (3, 2, 10)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25,) * 3
    assert config.bos_token_id is None
    assert config.eos_token_id is None
    assert config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    "shape",
    [
        *({"n_head": 3}, {"n_layer": 0}, {"n_embd": -64}),
        *({"dropout": 1.5}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_the_option_at_fault(shape):
    with pytest.raises(UserError, match=next(iter(shape))):
        CharacterModelArguments(**shape)
