import json
import math
from pathlib import Path

import pytest
import torch
from fidelity_job import BATCHES, run, saved_model
from launching import launch_two

from hf_saereg.fidelity import (
    FidelityError,
    baselines,
    fidelity,
    fidelity_of_each,
    predicted_positions,
)
from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.processes import start_accelerator
from hf_saereg.scores import Effect
from hf_saereg.splicing import Splice

CLOSE = {"rel": 1e-4, "abs": 1e-5}


def batch(input_ids):
    return {"input_ids": input_ids, "labels": input_ids}


@pytest.fixture
def batches(input_ids):
    """Two batches of unequal size and length."""
    return [batch(input_ids[:2]), batch(input_ids[2:, :4])]


@pytest.fixture
def foretold(plain_model, batches):
    """The same inputs, asked for what the model thinks likeliest: every ablation is a loss."""
    with torch.no_grad():
        guesses = [plain_model(b["input_ids"]).logits.argmax(-1) for b in batches]
    return [{**b, "labels": g.roll(1, dims=1)} for b, g in zip(batches, guesses, strict=True)]


def log_probabilities(logits):
    """(predictions, vocabulary) of every next token."""
    return logits[:, :-1].log_softmax(-1).flatten(0, 1)


def nats(logits, input_ids):
    """Cross-entropy of every predicted token."""
    return -log_probabilities(logits).gather(-1, input_ids[:, 1:].flatten()[:, None]).flatten()


def kl_by_hand(by_hand, model, batches, patches):
    """KL(original ‖ patched), mean over predicted tokens, as a sum over the vocabulary."""
    parts = []
    for b in batches:
        log_p = log_probabilities(by_hand(model, b["input_ids"])[1])
        log_q = log_probabilities(by_hand(model, b["input_ids"], patches)[1])
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts).mean().item()


def clean_ce(model, batches):
    return baselines(model, batches).clean_ce


def score(model, heads, batches):
    return fidelity(model, heads, batches, baselines(model, batches))


def ce_by_hand(by_hand, model, batches, patches=None):
    with torch.no_grad():
        parts = [nats(by_hand(model, b["input_ids"], patches)[1], b["input_ids"]) for b in batches]
    return torch.cat(parts).mean().item()


def exact_head(hook_name, d_in=16):
    """x and −x are its features, so that nothing is lost."""
    head = make_head(SAEHeadConfig("topk", hook_name, d_in, 2 * d_in, k=d_in))
    with torch.no_grad():
        head.W_enc.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)], dim=1))
        head.W_dec.copy_(head.W_enc.T)
    return head


def test_cross_entropy_is_a_mean_over_tokens_not_over_batches(plain_model, batches, by_hand):
    expected = ce_by_hand(by_hand, plain_model, batches)
    of_batches = [clean_ce(plain_model, [b]) for b in batches]
    assert clean_ce(plain_model, batches) == pytest.approx(expected, **CLOSE)
    assert abs(sum(of_batches) / 2 - expected) > 0.01


def test_ignored_labels_are_not_counted(plain_model, input_ids, by_hand):
    with_gap = batch(input_ids)
    with_gap["labels"] = input_ids.clone()
    with_gap["labels"][:, 5:] = -100
    found = clean_ce(plain_model, [with_gap, batch(input_ids)])
    cut = [batch(input_ids[:, :5]), batch(input_ids)]
    assert found == pytest.approx(ce_by_hand(by_hand, plain_model, cut), **CLOSE)


def test_batch_without_a_predicted_token_counts_for_nothing(plain_model, batches):
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    expected = clean_ce(plain_model, batches)
    assert clean_ce(plain_model, [*batches, nothing]) == pytest.approx(expected)


def test_exact_reconstruction_costs_nothing(plain_model, foretold):
    heads = HeadBank(exact_head(hook_name) for hook_name in plain_model.hook_names)
    scores = score(plain_model, heads, foretold)
    assert list(scores.sites) == plain_model.hook_names
    for site in scores.sites.values():
        assert site.effect.ce_increase == pytest.approx(0, abs=1e-6)
        assert site.effect.kl == pytest.approx(0, abs=1e-6)
        assert site.effect.ce_recovered == pytest.approx(1, abs=1e-4)
        assert site.effect.ce_recovered_from_zero == pytest.approx(1, abs=1e-4)
        assert site.statistics.fvu == pytest.approx(0, abs=1e-6)
        assert site.statistics.l0 == 16
        assert site.statistics.tokens == 24
    assert scores.compound.ce_increase == pytest.approx(0, abs=1e-6)
    assert scores.compound_l0 == 48


def test_each_site_alone_is_the_model_with_that_site_replaced(model, batches, by_hand):
    clean = clean_ce(model, batches)
    scores = score(model, model.heads, batches)
    for head in model.heads:
        hook_name = head.config.hook_name
        expected = ce_by_hand(by_hand, model, batches, {hook_name: head}) - clean
        effect = scores.sites[hook_name].effect
        assert effect.ce_increase == pytest.approx(expected, **CLOSE)
        assert abs(expected) > 0.01
        kl = kl_by_hand(by_hand, model, batches, {hook_name: head})
        assert effect.kl == pytest.approx(kl, **CLOSE)
        assert kl > 0.01
        x = torch.cat([by_hand(model, b["input_ids"])[0][hook_name].flatten(0, 1) for b in batches])
        statistics = head.losses(x).statistics
        assert scores.sites[hook_name].statistics.fvu == pytest.approx(statistics.fvu, rel=1e-3)
        assert scores.sites[hook_name].statistics.l0 == pytest.approx(statistics.l0, rel=1e-3)


def test_compound_replaces_all_sites_each_head_reading_the_replaced_stream(model, batches, by_hand):
    clean = clean_ce(model, batches)
    scores = score(model, model.heads, batches)
    patches = {head.config.hook_name: head for head in model.heads}
    expected = ce_by_hand(by_hand, model, batches, patches) - clean
    assert scores.compound.ce_increase == pytest.approx(expected, **CLOSE)
    kl = kl_by_hand(by_hand, model, batches, patches)
    assert scores.compound.kl == pytest.approx(kl, **CLOSE)

    streams = [by_hand(model, b["input_ids"], patches)[0] for b in batches]
    l0 = 0
    for hook_name, head in patches.items():
        x = torch.cat([stream[hook_name].flatten(0, 1) for stream in streams])
        l0 += (head.encode(x) > 0).sum(dim=-1).double().mean().item()
    assert scores.compound_l0 == pytest.approx(l0, rel=1e-3)


def test_subset_of_heads_replaces_that_subset(model, foretold):
    some = HeadBank([list(model.heads)[2]])
    scores = score(model, some, foretold)
    (site,) = scores.sites.values()
    assert scores.compound.ce_increase == pytest.approx(site.effect.ce_increase)
    assert scores.compound.ce_recovered is None  # nobody ablated these sites alone together
    assert site.effect.ce_recovered is not None


LENGTHS = torch.tensor([10, 6, 2])


def padded(input_ids, content, side):
    """Rows of 10, 6 and 2 tokens, padded with `content` to 12; labels tell nothing of it."""
    positions = torch.arange(12) if side == "right" else torch.arange(12).flip(0)
    mask = positions < LENGTHS[:, None]
    ids = torch.full((3, 12), content)
    for row, length in enumerate(LENGTHS):
        ids[row, mask[row]] = input_ids[row, :length]
    labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def assert_same_scores(found, expected):
    figures, theirs = found.figures(), expected.figures()
    assert figures.keys() == theirs.keys()
    for name, figure in figures.items():
        assert figure == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("content", [0, 77])
def test_padding_is_neither_counted_nor_a_matter_of_its_content(model, input_ids, content, side):
    """Nor does its side matter: CE, KL, L0 and norms are those of the rows without it."""
    rows = [batch(ids[None, :n]) for ids, n in zip(input_ids, LENGTHS, strict=True)]
    batches = [padded(input_ids, content, side)]
    found = score(model, model.heads, batches)
    assert_same_scores(found, score(model, model.heads, rows))
    assert all(site.statistics.tokens == 18 for site in found.sites.values())
    base, expected = baselines(model, batches), baselines(model, rows)
    assert base.residual_norm == pytest.approx(expected.residual_norm, **CLOSE)
    for hook_name, shares in base.spectrum.items():
        assert shares == pytest.approx(expected.spectrum[hook_name], rel=1e-3, abs=1e-5)


def test_positions_that_a_batch_has_are_kept(model, input_ids):
    positions = torch.arange(10).expand(3, -1) + 7
    mask = torch.ones_like(input_ids)
    shifted = {**batch(input_ids), "attention_mask": mask, "position_ids": positions}
    base = baselines(model, [shifted])
    with torch.no_grad(), model.reading(model.hook_names) as activations:
        expected = model(input_ids, labels=input_ids, position_ids=positions).loss.item()
    assert base.clean_ce == pytest.approx(expected, **CLOSE)
    assert base.clean_ce != pytest.approx(clean_ce(model, [batch(input_ids)]), rel=1e-3)
    for hook_name, x in activations.items():
        assert base.residual_norm[hook_name] == pytest.approx(x.norm(dim=-1).mean().item(), **CLOSE)


def test_the_first_token_after_padding_is_not_predicted(input_ids):
    right, left = (padded(input_ids, 0, side) for side in ("right", "left"))
    assert predicted_positions(right).sum(dim=1).tolist() == [9, 5, 1]
    assert predicted_positions(left).sum(dim=1).tolist() == [9, 5, 1]
    by_labels = (left["labels"][:, 1:] != -100).sum(dim=1)
    assert by_labels.tolist() == [10, 6, 2]


def test_splice_leaves_padding_as_it_was():
    head = make_head(SAEHeadConfig("standard", "blocks.0.hook_resid_pre", 16, 32))
    splice, x = Splice(head), torch.randn(2, 4, 16)
    before = x.clone()
    splice.mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    with torch.no_grad():
        replaced = splice(x)
    kept = splice.mask == 0
    assert torch.equal(replaced[kept], x[kept])
    torch.testing.assert_close(replaced[~kept], head(x[~kept]).detach())
    assert torch.equal(x, before)
    assert splice.statistics.tokens == 5


def test_mean_ablation_is_the_stream_replaced_by_its_mean(plain_model, batches, by_hand):
    base = baselines(plain_model, batches)
    streams = [by_hand(plain_model, b["input_ids"])[0] for b in batches]
    ablations = {}
    for hook_name in plain_model.hook_names:
        x = torch.cat([stream[hook_name].flatten(0, 1) for stream in streams]).detach()
        mean = x.mean(dim=0)
        ablations[hook_name] = lambda x, mean=mean: mean.expand_as(x)
        expected = ce_by_hand(by_hand, plain_model, batches, {hook_name: ablations[hook_name]})
        assert base.mean_ablated_ce[hook_name] == pytest.approx(expected, **CLOSE)
        assert base.residual_norm[hook_name] == pytest.approx(x.norm(dim=-1).mean().item(), **CLOSE)
    assert base.clean_ce == pytest.approx(ce_by_hand(by_hand, plain_model, batches), **CLOSE)
    all_ablated = ce_by_hand(by_hand, plain_model, batches, ablations)
    assert base.mean_ablated_ce_all == pytest.approx(all_ablated, **CLOSE)
    assert abs(all_ablated - base.clean_ce) > 0.01


def test_zero_ablation_is_the_stream_replaced_by_zeros(plain_model, batches, by_hand):
    base = baselines(plain_model, batches)
    patches = dict.fromkeys(plain_model.hook_names, torch.zeros_like)
    for hook_name in plain_model.hook_names:
        only = {hook_name: torch.zeros_like}
        expected = ce_by_hand(by_hand, plain_model, batches, only)
        assert base.zero_ablated_ce[hook_name] == pytest.approx(expected, **CLOSE)
    expected = ce_by_hand(by_hand, plain_model, batches, patches)
    assert base.zero_ablated_ce_all == pytest.approx(expected, **CLOSE)
    assert base.zero_ablated_ce_all != pytest.approx(base.mean_ablated_ce_all, rel=1e-3)


def mean_head(hook_name, mean):
    """Reconstructs the mean whatever it reads, with no latent active."""
    head = make_head(SAEHeadConfig("standard", hook_name, len(mean), 4))
    with torch.no_grad():
        head.b_enc.fill_(-1e3)
        head.b_dec.copy_(mean)
    return head.eval()


def test_predicting_the_mean_recovers_and_explains_nothing(plain_model, foretold, by_hand):
    hook_names = plain_model.hook_names
    streams = [by_hand(plain_model, b["input_ids"])[0] for b in foretold]
    heads = HeadBank(
        mean_head(name, torch.cat([s[name].flatten(0, 1) for s in streams]).mean(0).detach())
        for name in hook_names
    )
    scores = score(plain_model, heads, foretold)
    for site in scores.sites.values():
        assert site.effect.ce_recovered == pytest.approx(0, abs=1e-4)
        assert site.statistics.explained_variance == pytest.approx(0, abs=1e-5)
        assert site.statistics.dead_fraction == 1
    assert scores.compound.ce_recovered == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("ablated", "recovered"), [(4.0, 0.75), (2.0, None), (1.5, None), (None, None)]
)
def test_recovered_is_a_share_of_what_ablation_costs(ablated, recovered):
    effect = Effect(ce=2.5, kl=0.1, clean_ce=2.0, mean_ablated_ce=ablated, zero_ablated_ce=ablated)
    assert effect.ce_recovered == effect.ce_recovered_from_zero == recovered
    assert effect.ce_increase == 0.5


def test_each_of_several_sets_of_heads_is_scored_as_if_alone(model, batches):
    base = baselines(model, batches)
    banks = {"all": model.heads, "last": HeadBank([list(model.heads)[2]])}
    together = fidelity_of_each(model, banks, batches, base)
    for name, bank in banks.items():
        assert together[name].figures() == fidelity(model, bank, batches, base).figures()


def test_text_without_a_prediction_is_refused(plain_model, input_ids):
    with pytest.raises(FidelityError, match="No token"):
        baselines(plain_model, [batch(input_ids[:, :1])])


def test_figures_are_finite_and_named_by_site(model, foretold):
    figures = score(model, model.heads, foretold).figures()
    assert all(math.isfinite(figure) for figure in figures.values())
    for name in ("ce_increase", "ce_recovered", "kl", "mean_ablated_ce", "l0", "fvu"):
        for hook_name in model.hook_names:
            assert f"{name}/{hook_name}" in figures
    assert {"clean_ce", "compound_kl", "compound_l0", "compound_ce_increase"} <= figures.keys()


def test_measuring_changes_nothing(model, batches):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, model.heads, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    """What two processes found, each, and what one finds."""
    folder = tmp_path_factory.mktemp("shared")
    saved_model(folder / "model")
    launch_two(Path(__file__).with_name("fidelity_job.py"), folder)
    two = [json.loads((folder / f"found_{rank}.json").read_text()) for rank in (0, 1)]
    return two, run(folder, start_accelerator())


def numbers(found, path=()):
    if isinstance(found, dict):
        return {
            k: v for name, part in found.items() for k, v in numbers(part, (*path, name)).items()
        }
    return {path: found}


@pytest.mark.slow
@pytest.mark.parametrize("batches", list(BATCHES))
def test_two_processes_find_what_one_finds(shared_out, batches):
    (first, second), one = shared_out
    assert (first["world_size"], second["world_size"], one["world_size"]) == (2, 2, 1)
    assert first[batches] == second[batches]
    ours, expected = numbers(first[batches]), numbers(one[batches])
    assert ours.keys() == expected.keys()
    assert len(ours) > 50
    for path, number in expected.items():
        assert ours[path] == pytest.approx(number, rel=1e-6, abs=1e-9), path


@pytest.mark.slow
def test_a_trainers_evaluation_scores_the_same_on_two_processes(shared_out):
    """Nine rows: the trainer's own loader gives one of them to both processes."""
    (first, _), one = shared_out
    for name, figure in one["five"]["figures"].items():
        assert one["evaluated"][name] == pytest.approx(figure, rel=1e-6, abs=1e-9), name
        assert first["evaluated"][name] == pytest.approx(figure, rel=1e-6, abs=1e-9), name
