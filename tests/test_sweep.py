import math

import pytest
import torch
from datasets import Dataset

from hf_saereg.errors import UserError
from hf_saereg.sweep import Cell, FreshHeadsArguments, train_fresh_heads

TINY = {
    "fresh_k": [3, 6],
    "fresh_coefficient": [0.2],
    "fresh_d_sae": [32],
    "fresh_steps": 60,
    "fresh_batch_size": 8,
    "fresh_learning_rate": 1e-2,
    "fresh_warmup_steps": 5,
}
UNTRAINED = {"fresh_steps": 1, "fresh_learning_rate": 1e-30}
CELLS = [Cell("topk", 3), Cell("topk", 6), Cell("standard", 0.2)]


@pytest.fixture
def blocks():
    """Eight blocks: one batch, so that every batch holds the same tokens."""
    generator = torch.Generator().manual_seed(3)
    return Dataset.from_dict({"input_ids": torch.randint(128, (8, 12), generator=generator)})


@pytest.fixture
def train(plain_model, blocks):
    def call(seed=0, on_half=None, **options):
        arguments = FreshHeadsArguments(**{**TINY, **options})
        return train_fresh_heads(plain_model, blocks, arguments, seed, "test", on_half)

    return call


@pytest.fixture
def activations(plain_model, blocks):
    """Raw activations of all tokens, (tokens, d_in) by hook name."""
    with torch.no_grad(), plain_model.reading(plain_model.hook_names) as activations:
        plain_model(torch.tensor(blocks["input_ids"][:]))
    return {hook_name: x.flatten(0, 1) for hook_name, x in activations.items()}


def tensors(grid):
    return {
        f"{cell.name}/{name}": tensor
        for cell, bank in grid.items()
        for name, tensor in bank.named_parameters()
    }


def test_every_cell_gets_a_head_on_every_site(train, plain_model):
    grid = train(**UNTRAINED)
    assert list(grid) == CELLS
    for cell, bank in grid.items():
        assert bank.hook_names == plain_model.hook_names
        for config in bank.configs:
            assert (config.architecture, config.d_in, config.d_sae) == (cell.architecture, 16, 32)
            sparsity = config.k if cell.architecture == "topk" else config.sparsity_coefficient
            assert sparsity == cell.sparsity


def test_training_lowers_the_loss_of_every_head(train, activations):
    before, after = train(**UNTRAINED), train()
    for cell, bank in after.items():
        for head in bank:
            x = activations[head.config.hook_name]
            scale = math.sqrt(16) / x.norm(dim=-1).mean().item()  # losses count at this scale
            old = before[cell][head.config.hook_name].folded(1 / scale).losses(scale * x)
            new = head.folded(1 / scale).losses(scale * x)
            trained = new.reconstruction + new.sparsity
            assert trained < 0.6 * (old.reconstruction + old.sparsity), (cell, head.config)


def test_heads_read_raw_activations(train, activations):
    """The scale of training is found again in the initial weights, where W_enc was W_decᵀ."""
    for bank in train(**UNTRAINED).values():
        for head in bank:
            x = activations[head.config.hook_name]
            scale = math.sqrt(16) / x.norm(dim=-1).mean()
            torch.testing.assert_close(head.b_dec, x.mean(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(head.W_enc / scale, head.W_dec.T * scale, rtol=1e-4, atol=0)
            bound = math.sqrt(6 / 16)
            assert 0.8 * bound < (head.W_dec * scale).max() <= bound * 1.0001
            assert not torch.isclose(scale, torch.ones(()), atol=0.1)


def test_trained_heads_explain_raw_activations_but_not_scaled_ones(train, activations):
    for head in train()[Cell("topk", 6)]:
        x = activations[head.config.hook_name]
        scale = math.sqrt(16) / x.norm(dim=-1).mean().item()
        assert head.losses(x).statistics.fvu < 0.4
        assert head.losses(x).statistics.fvu < head.losses(scale * x).statistics.fvu


def test_same_seed_gives_the_same_heads_whatever_was_drawn_before(train):
    first = tensors(train(seed=5, fresh_steps=4))
    torch.rand(7)
    second = tensors(train(seed=5, fresh_steps=4))
    other = tensors(train(seed=6, fresh_steps=4))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_model_is_left_byte_for_byte_as_it_was(train, plain_model):
    before = {name: tensor.clone() for name, tensor in plain_model.state_dict().items()}
    train(fresh_steps=4)
    after = plain_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in plain_model.parameters())
    assert all(parameter.requires_grad for parameter in plain_model.parameters())
    assert not any(module._forward_pre_hooks for module in plain_model.modules())


def test_dropout_of_the_model_is_off_while_heads_read_it(train, plain_model):
    seen = tensors(train(fresh_steps=3))
    for module in plain_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    plain_model.train()
    assert all(torch.equal(t, seen[name]) for name, t in tensors(train(fresh_steps=3)).items())


def test_heads_at_half_time_are_copies_between_start_and_end(train):
    halves = []
    final = tensors(train(on_half=halves.append, fresh_steps=20))
    (half,) = map(tensors, halves)
    start = tensors(train(**UNTRAINED))
    assert half.keys() == final.keys()
    for name in (name for name in final if name.endswith("W_dec")):
        assert not torch.equal(half[name], final[name])
        assert not torch.allclose(half[name], start[name])


def test_watching_the_half_changes_nothing(train):
    unwatched, watched = train(fresh_steps=6), train(fresh_steps=6, on_half=lambda grid: None)
    theirs = tensors(unwatched)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(watched).items())


@pytest.mark.parametrize(
    ("cell", "name"),
    [(Cell("topk", 10), "topk_k10"), (Cell("standard", 0.5), "standard_c0.5")],
)
def test_name_of_a_cell_says_what_it_is(cell, name):
    assert cell.name == name


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"fresh_steps": 0}, "fresh_steps"),
        ({"fresh_batch_size": 0}, "fresh_batch_size"),
        ({"fresh_d_sae": [32, 0]}, "d_sae"),
        ({"fresh_d_sae": []}, "fresh_d_sae"),
        ({"fidelity_blocks": -1}, "fidelity_blocks"),
        ({"fresh_warmup_steps": -1}, "fresh_warmup_steps"),
        ({"fresh_learning_rate": 0.0}, "fresh_learning_rate"),
        ({"fresh_learning_rate": math.nan}, "fresh_learning_rate"),
        ({"fresh_architectures": ["topk", "nonesuch"]}, "nonesuch"),
        ({"fresh_architectures": []}, "fresh_architectures"),
        ({"fresh_architectures": ["topk"], "fresh_k": []}, "fresh_k"),
        ({"fresh_k": [4, 0]}, "is 0"),
        ({"fresh_k": [33]}, "is 33"),
        ({"fresh_coefficient": [-0.5]}, "-0.5"),
        ({"fresh_coefficient": [math.inf]}, "inf"),
    ],
)
def test_bad_option_is_named_in_one_sentence(options, culprit):
    with pytest.raises(UserError) as caught:
        FreshHeadsArguments(**{**TINY, **options})
    assert culprit in str(caught.value)
    assert "\n" not in str(caught.value)
