import pytest
import torch

from hf_saereg.fidelity import Splice, baselines, cross_entropy, fidelity
from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank

CLOSE = {"rel": 1e-4, "abs": 1e-5}


def batch(input_ids):
    return {"input_ids": input_ids, "labels": input_ids}


@pytest.fixture
def batches(input_ids):
    """Two batches of unequal size and length."""
    return [batch(input_ids[:2]), batch(input_ids[2:, :4])]


def nats(logits, input_ids):
    """Cross-entropy of every predicted token."""
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, input_ids[:, 1:, None]).flatten()


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
    of_batches = [cross_entropy(plain_model, [b]) for b in batches]
    assert cross_entropy(plain_model, batches) == pytest.approx(expected, **CLOSE)
    assert abs(sum(of_batches) / 2 - expected) > 0.01


def test_ignored_labels_are_not_counted(plain_model, input_ids, by_hand):
    with_gap = batch(input_ids)
    with_gap["labels"] = input_ids.clone()
    with_gap["labels"][:, 5:] = -100
    found = cross_entropy(plain_model, [with_gap, batch(input_ids)])
    cut = [batch(input_ids[:, :5]), batch(input_ids)]
    assert found == pytest.approx(ce_by_hand(by_hand, plain_model, cut), **CLOSE)


def test_batch_without_a_predicted_token_counts_for_nothing(plain_model, batches):
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    expected = cross_entropy(plain_model, batches)
    assert cross_entropy(plain_model, [*batches, nothing]) == pytest.approx(expected)


def test_exact_reconstruction_costs_nothing(plain_model, batches):
    heads = HeadBank(exact_head(hook_name) for hook_name in plain_model.hook_names)
    clean = cross_entropy(plain_model, batches)
    scores = fidelity(plain_model, heads, batches, clean)
    assert list(scores.sites) == plain_model.hook_names
    for site in scores.sites.values():
        assert site.ce_increase == pytest.approx(0, abs=1e-6)
        assert site.statistics.fvu == pytest.approx(0, abs=1e-6)
        assert site.statistics.l0 == 16
        assert site.statistics.tokens == 24
    assert scores.compound_ce_increase == pytest.approx(0, abs=1e-6)
    assert scores.compound_l0 == 48


def test_each_site_alone_is_the_model_with_that_site_replaced(model, batches, by_hand):
    clean = cross_entropy(model, batches)
    scores = fidelity(model, model.heads, batches, clean)
    for head in model.heads:
        hook_name = head.config.hook_name
        expected = ce_by_hand(by_hand, model, batches, {hook_name: head}) - clean
        assert scores.sites[hook_name].ce_increase == pytest.approx(expected, **CLOSE)
        assert abs(expected) > 0.01
        x = torch.cat([by_hand(model, b["input_ids"])[0][hook_name].flatten(0, 1) for b in batches])
        statistics = head.losses(x).statistics
        assert scores.sites[hook_name].statistics.fvu == pytest.approx(statistics.fvu, rel=1e-3)
        assert scores.sites[hook_name].statistics.l0 == pytest.approx(statistics.l0, rel=1e-3)


def test_compound_replaces_all_sites_each_head_reading_the_replaced_stream(model, batches, by_hand):
    clean = cross_entropy(model, batches)
    scores = fidelity(model, model.heads, batches, clean)
    patches = {head.config.hook_name: head for head in model.heads}
    expected = ce_by_hand(by_hand, model, batches, patches) - clean
    assert scores.compound_ce_increase == pytest.approx(expected, **CLOSE)

    streams = [by_hand(model, b["input_ids"], patches)[0] for b in batches]
    l0 = 0
    for hook_name, head in patches.items():
        x = torch.cat([stream[hook_name].flatten(0, 1) for stream in streams])
        l0 += (head.encode(x) > 0).sum(dim=-1).double().mean().item()
    assert scores.compound_l0 == pytest.approx(l0, rel=1e-3)


def test_subset_of_heads_replaces_that_subset(model, batches, by_hand):
    some = HeadBank([list(model.heads)[2]])
    clean = cross_entropy(model, batches)
    scores = fidelity(model, some, batches, clean)
    (site,) = scores.sites.values()
    assert scores.compound_ce_increase == pytest.approx(site.ce_increase)


def padded(input_ids, content):
    """Rows of 10, 6 and 2 tokens, padded on the right with `content`."""
    mask = torch.arange(12) < torch.tensor([10, 6, 2])[:, None]
    ids = torch.full((3, 12), content)
    ids[:, :10] = input_ids
    ids = ids.masked_fill(~mask, content)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }


@pytest.mark.parametrize("content", [0, 77])
def test_padding_is_neither_counted_nor_a_matter_of_its_content(model, input_ids, content):
    rows = [batch(ids[None, :length]) for ids, length in zip(input_ids, (10, 6, 2), strict=True)]
    clean, base = cross_entropy(model, rows), baselines(model, rows)
    expected = fidelity(model, model.heads, rows, clean)
    padded_batches = [padded(input_ids, content)]
    assert cross_entropy(model, padded_batches) == pytest.approx(clean, **CLOSE)
    found = fidelity(model, model.heads, padded_batches, clean)
    assert found.compound_ce_increase == pytest.approx(expected.compound_ce_increase, **CLOSE)
    assert found.compound_l0 == pytest.approx(expected.compound_l0, **CLOSE)
    for hook_name, site in found.sites.items():
        theirs = expected.sites[hook_name]
        assert site.ce_increase == pytest.approx(theirs.ce_increase, **CLOSE)
        assert site.statistics.tokens == 18
        assert site.statistics.fvu == pytest.approx(theirs.statistics.fvu, **CLOSE)
        assert site.statistics.l0 == pytest.approx(theirs.statistics.l0, **CLOSE)
    padded_base = baselines(model, padded_batches)
    assert padded_base.clean_ce == pytest.approx(base.clean_ce, **CLOSE)
    assert padded_base.mean_ablated_ce == pytest.approx(base.mean_ablated_ce, **CLOSE)
    assert padded_base.mean_ablated_ce_all == pytest.approx(base.mean_ablated_ce_all, **CLOSE)
    assert padded_base.residual_norm == pytest.approx(base.residual_norm, **CLOSE)


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


def test_measuring_changes_nothing(model, batches):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fidelity(model, model.heads, batches, 0.0)
    baselines(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
