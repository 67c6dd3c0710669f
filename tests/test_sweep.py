"""Fresh heads: what trains them, what they depend on, and how an interrupted cell goes on."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from datasets import Dataset

from hf_saereg.errors import UserError
from hf_saereg.fresh import score_model
from hf_saereg.grid import DEAD_AFTER_TOKENS, Cell, FreshHeadsArguments, Schedule
from hf_saereg.heads import SAEHeadConfig
from hf_saereg.sweep import DivergedError, SharedTraining, _batches
from hf_saereg.sweep_state import SweepStateError, load_state, save_state

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


def cells(seed=0):
    return [
        Cell("topk", 3, "k", (32,), seed),
        Cell("topk", 6, "k", (32,), seed),
        Cell("standard", 0.2, "sparsity_coefficient", (32,), seed),
    ]


@pytest.fixture
def blocks():
    """Eight blocks: one batch, so that every batch holds the same tokens."""
    generator = torch.Generator().manual_seed(3)
    return Dataset.from_dict({"input_ids": torch.randint(128, (8, 12), generator=generator)})


@pytest.fixture
def train(plain_model, blocks):
    """Trains a grid; whole heads by cell, and half-trained ones too where `halves` is a dict."""

    def call(seed=0, halves=None, **options):
        arguments = FreshHeadsArguments(**{**TINY, **options})
        shared = SharedTraining.of(plain_model, blocks, arguments.schedule, seed)
        trainings = [shared.start(cell) for cell in arguments.cells(seed)]
        shared.run(trainings, "test", show_progress=False)
        finished = {training.cell: shared.finished(training) for training in trainings}
        if halves is not None:
            halves |= {cell: heads.half for cell, heads in finished.items()}
        return {cell: heads.whole for cell, heads in finished.items()}

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
    assert list(grid) == cells()
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
    for head in train()[cells()[1]]:
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
    pairs = zip(first.values(), other.values(), strict=True)
    assert not any(torch.equal(tensor, another) for tensor, another in pairs)


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
    halves = {}
    final = tensors(train(halves=halves, fresh_steps=20))
    half, start = tensors(halves), tensors(train(**UNTRAINED))
    assert half.keys() == final.keys()
    for name in (name for name in final if name.endswith("W_dec")):
        assert not torch.equal(half[name], final[name])
        assert not torch.allclose(half[name], start[name])


def test_heads_at_half_time_are_those_of_a_training_half_as_long(train):
    halves = {}
    train(halves=halves, fresh_steps=20)
    shorter = tensors(train(fresh_steps=10))
    assert all(torch.equal(t, shorter[name]) for name, t in tensors(halves).items())


def test_a_cell_does_not_depend_on_the_cells_beside_it(train):
    together = tensors(train(fresh_steps=6))
    alone = tensors(train(fresh_steps=6, fresh_architectures=["standard"]))
    assert alone and all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


def test_batches_from_the_middle_on_are_the_same(blocks):
    whole = list(islice(_batches(blocks, 3, seed=2), 11))
    rest = list(islice(_batches(blocks, 3, seed=2, start=4), 7))
    assert [len(batch) for batch in whole[:3]] == [3, 3, 2]  # an epoch
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert not torch.equal(whole[0], whole[3])


# ---- interrupted ----


@pytest.fixture
def shared(plain_model, blocks):
    schedule = FreshHeadsArguments(**TINY | {"fresh_steps": 16}).schedule  # forks at 4, half is 8
    assert (schedule.fork, schedule.half) == (4, 8)
    return SharedTraining.of(plain_model, blocks, schedule, 0)


class StopError(RuntimeError):
    pass


def stop_at(*steps):
    def keep(step):
        if step in steps:
            raise StopError

    return keep


def everything(shared, training):
    heads = shared.finished(training)
    return tensors({training.cell: heads.whole}), tensors({training.cell: heads.half})


INTERRUPTED = [
    Cell("topk", 3, "k", (32,), 1),
    Cell("standard", 4, "target_l0", (24,), 0),
    Cell("batchtopk", 5, "k", (32,), 2),
]


@pytest.mark.parametrize("stopped_at", [0, 3, 4, 6, 8, 12, 16])
def test_a_kept_cell_ends_as_one_that_was_never_interrupted(shared, tmp_path, stopped_at):
    """Before, at, and after the fork and the end of the shorter training."""
    uninterrupted = [shared.start(cell) for cell in INTERRUPTED]
    shared.run(uninterrupted, "test", show_progress=False)
    broken = [shared.start(cell) for cell in INTERRUPTED]
    if stopped_at:
        with pytest.raises(StopError):
            shared.run(broken, "test", stop_at(stopped_at), show_progress=False)
    for number, training in enumerate(broken):
        save_state(training, tmp_path / f"{number}.safetensors")
    torch.rand(3)
    resumed = [shared.start(cell) for cell in INTERRUPTED]
    for number, training in enumerate(resumed):
        load_state(training, tmp_path / f"{number}.safetensors", shared.schedule.half)
        assert training.whole.step == stopped_at
    shared.run(resumed, "test", show_progress=False)
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        for found, expected in zip(
            everything(shared, ours), everything(shared, theirs), strict=True
        ):
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        for ours_head, their_head in zip(ours.whole.bank, theirs.whole.bank, strict=True):
            for name, buffer in ours_head.named_buffers():
                assert torch.equal(buffer, their_head.get_buffer(name)), name


def test_weights_that_are_not_finite_are_named_and_not_kept(plain_model, blocks, tmp_path):
    arguments = FreshHeadsArguments(**TINY | {"fresh_k": [3], "fresh_learning_rate": 1e38})
    splits = {"train": blocks, "validation": blocks}
    with pytest.raises(DivergedError, match=r"topk_k3_d32_s0 at blocks\.0\.hook_resid_pre has"):
        score_model("model", plain_model, splits, arguments.sweep(0), tmp_path)
    assert not list((tmp_path / "cells").iterdir()) and not (tmp_path / "unfinished").exists()


def test_every_own_head_has_its_own_sparsity(plain_model, blocks, tmp_path):
    sites = plain_model.hook_names[:2]
    plain_model.attach_heads(
        [SAEHeadConfig("topk", name, 16, 32, k=k) for name, k in zip(sites, (2, 5), strict=True)]
    )
    splits, arguments = {"train": blocks, "validation": blocks}, FreshHeadsArguments(**TINY)
    sweep = replace(arguments.sweep(0), cells=())
    found = score_model("model", plain_model, splits, sweep, tmp_path)
    assert [row["sparsity"] for row in found["rows"]] == [2, 5]
    (compound,) = found["compound"]
    assert compound["sparsity"] == "2-5" and compound["d_sae"] == 32


def test_cells_that_are_ahead_wait_for_the_others(shared):
    ahead, behind = shared.start(INTERRUPTED[0]), shared.start(INTERRUPTED[1])
    with pytest.raises(StopError):
        shared.run([ahead], "test", stop_at(9), show_progress=False)
    with pytest.raises(StopError):
        shared.run([behind], "test", stop_at(5), show_progress=False)
    shared.run([ahead, behind], "test", show_progress=False)
    for training in (ahead, behind):
        alone = shared.start(training.cell)
        shared.run([alone], "test", show_progress=False)
        expected = everything(shared, alone)[0]
        found = everything(shared, training)[0]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_moments_are_needed_to_go_on(shared, tmp_path):
    """Otherwise the test above would not notice their loss."""
    whole, resumed = (shared.start(INTERRUPTED[0]) for _ in range(2))
    with pytest.raises(StopError):
        shared.run([resumed], "test", stop_at(6), show_progress=False)
    resumed.whole.optimizer.state.clear()
    shared.run([resumed], "test", show_progress=False)
    shared.run([whole], "test", show_progress=False)
    ours, theirs = everything(shared, resumed)[0], everything(shared, whole)[0]
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if "W_dec" in name)


@pytest.mark.parametrize("damage", ["truncated", "other heads"])
def test_a_kept_cell_that_cannot_be_used_is_named(shared, tmp_path, damage):
    path = tmp_path / "cell.safetensors"
    save_state(shared.start(INTERRUPTED[1 if damage == "other heads" else 0]), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SweepStateError, match=r"cell\.safetensors cannot .* delete it") as caught:
        load_state(shared.start(INTERRUPTED[0]), path, shared.schedule.half)
    assert "\n" not in str(caught.value)


# ---- the grid ----


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (Cell("topk", 10, "k", (512,), 0), "topk_k10_d512_s0"),
        (Cell("standard", 0.5, "sparsity_coefficient", (8, 16), 3), "standard_c0.5_d8-16_s3"),
        (Cell("gated", 10.0, "target_l0", (512,), 1), "gated_l10_d512_s1"),
    ],
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


def test_auxk_reaches_the_families_that_have_it():
    def configs(**options):
        arguments = FreshHeadsArguments(**{**TINY, **options})
        return {cell.architecture: cell.heads(["site"], 16)[0] for cell in arguments.cells(0)}

    with_auxk = configs(fresh_auxk=4, fresh_dead_after_tokens=300)
    assert (with_auxk["topk"].auxk, with_auxk["topk"].dead_after_tokens) == (4, 300)
    assert with_auxk["standard"] == configs()["standard"]
    assert configs(fresh_auxk=4)["topk"].dead_after_tokens == DEAD_AFTER_TOKENS
    assert configs()["topk"].dead_after_tokens == 1_000_000


def test_auxk_trains_latents_once_they_count_as_dead(train):
    only = {"fresh_architectures": ["topk"], "fresh_k": [1]}
    (plain,) = train(**only).values()
    (early,) = train(**only, fresh_auxk=8, fresh_dead_after_tokens=300).values()
    (never,) = train(**only, fresh_auxk=8, fresh_dead_after_tokens=10**6).values()
    for without, with_auxk, too_late in zip(plain, early, never, strict=True):
        dead = without.tokens_since_fired >= 300
        assert dead.any()
        assert (with_auxk.W_dec != too_late.W_dec)[dead].any(dim=1).all()
        # one by one, for AuxK, and stacked: alike to rounding
        torch.testing.assert_close(too_late.W_dec, without.W_dec, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"fresh_auxk": 40}, "is 40"),
        ({"fresh_auxk": -1}, "is -1"),
        ({"fresh_auxk": 4, "fresh_dead_after_tokens": 0}, "dead_after_tokens"),
        ({"fresh_auxk": 4, "fresh_architectures": ["standard"]}, "fresh_auxk is 4"),
        ({"fresh_dead_after_tokens": 300}, "fresh_dead_after_tokens is 300"),
    ],
)
def test_auxk_that_cannot_work_is_refused(options, culprit):
    with pytest.raises(UserError, match=culprit):
        FreshHeadsArguments(**{**TINY, **options})


def test_other_options_reach_the_families_that_have_them():
    families = ["standard", "jumprelu"]
    options = '{"tied": true, "bandwidth": 0.25, "unit_decoder_norm": true}'
    arguments = FreshHeadsArguments(
        **TINY | {"fresh_architectures": families, "fresh_head_options": options}
    )
    found = {cell.architecture: cell.heads(["site"], 16)[0] for cell in arguments.cells(0)}
    assert (found["standard"].tied, found["jumprelu"].tied) == (True, False)
    assert found["jumprelu"].bandwidth == 0.25 != found["standard"].bandwidth
    assert all(config.unit_decoder_norm for config in found.values())


def test_other_options_are_those_of_the_heads_that_are_trained(train):
    options = {"fresh_architectures": ["standard"], "fresh_coefficient": [1.0]}
    ((head, *_),) = train(**options, fresh_head_options='{"unit_decoder_norm": true}').values()
    assert head.config.unit_decoder_norm
    norms = head.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))  # all as large, unscaled


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ("tied", "no JSON"),
        ("[1]", "by name"),
        ('{"bandwidth": 0.1}', "'bandwidth', which none of topk, standard has"),
        ('{"tide": true}', "'tide', which none of"),
        ('{"k": 3}', "'k', which none of"),
        ('{"rectified": false}', "only rectified heads can be saved"),
    ],
)
def test_other_options_that_no_head_has_are_refused(options, culprit):
    with pytest.raises(UserError, match=culprit):
        FreshHeadsArguments(**TINY, fresh_head_options=options)


def test_a_sparsity_that_is_no_whole_number_is_none_for_topk():
    with pytest.raises(UserError, match="whole number"):
        Cell("topk", 2.5, "k", (32,), 0).check()


def test_learning_rate_rises_stays_and_falls():
    schedule = Schedule(steps=10, batch_size=1, learning_rate=2.0, cooldown=0.4, warmup_steps=2)
    rates = [schedule.learning_rate_at(step, 10) for step in range(10)]
    assert rates == pytest.approx([1, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4])
