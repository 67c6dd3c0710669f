"""Options of the term: normalizations, tokens and sites it covers, warm-up, the spliced loss."""

import math
from collections import Counter

import pytest
import torch
from conftest import SITES
from torch.nn.functional import cross_entropy, kl_div

from hf_saereg.heads import FAMILIES, HeadConfigError, SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.regularizer import TermOptions, random_tokens, regularization, site_term

SCALE_FREE = ("layer_norm", "variance")


def head_with(normalization, architecture="standard", **options):
    torch.manual_seed(0)
    if architecture in ("topk", "batchtopk"):
        options["k"] = 4
    options = {"sparsity_coefficient": 0.1, "reconstruction_weight": 3.0} | options
    config = SAEHeadConfig(architecture, SITES[0], 16, 48, normalization=normalization, **options)
    head = make_head(config).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def tokens(number=60):
    generator = torch.Generator().manual_seed(3)
    return 2 + torch.randn(number, 16, dtype=torch.float64, generator=generator)


def value_and_gradient(head, x):
    x = x.clone().requires_grad_()
    value = site_term(head, x).value
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("scale", [0.01, 0.5, 100.0])
@pytest.mark.parametrize("normalization", SCALE_FREE)
def test_scaling_activations_changes_neither_term_nor_direction(normalization, scale, architecture):
    head, x = head_with(normalization, architecture), tokens()
    value, gradient = value_and_gradient(head, x)
    scaled_value, scaled_gradient = value_and_gradient(head, scale * x)
    # layer_norm adds SAELens's 1e-5 to the spread, which is 0.01 in the smallest case
    close = {"rtol": 1e-10, "atol": 1e-10} if normalization == "variance" else {"rtol": 0.01}
    torch.testing.assert_close(scaled_value, value, **{"atol": 0.0} | close)
    cosine = torch.cosine_similarity(scaled_gradient.flatten(), gradient.flatten(), dim=0)
    assert cosine > 1 - (1e-12 if normalization == "variance" else 1e-3)


@pytest.mark.parametrize("normalization", ["published", "detached"])
def test_the_published_forms_reward_shrinking(normalization):
    head, x = head_with(normalization), tokens()
    assert value_and_gradient(head, x / 2)[0] < 0.7 * value_and_gradient(head, x)[0]


@pytest.mark.parametrize("normalization", SCALE_FREE)
def test_a_scale_free_term_pulls_at_no_radius(normalization):
    """Its gradient is orthogonal to X: no shorter and no longer stream lowers it."""
    x = tokens()
    gradient = value_and_gradient(head_with(normalization), x)[1]
    assert (gradient * x).sum().abs() < 1e-3 * gradient.norm() * x.norm()
    gradient = value_and_gradient(head_with("published"), x)[1]
    assert (gradient * x).sum() > 1e-2 * gradient.norm() * x.norm()


def test_detached_is_the_published_value_without_the_norms_gradient():
    x, heads = tokens(), [head_with(name) for name in ("published", "detached")]
    (published, with_norm), (detached, without_norm) = (value_and_gradient(h, x) for h in heads)
    assert published == detached
    error, norm = heads[0].losses(x).reconstruction.detach(), x.norm(dim=1).mean()
    of_norm = -3.0 * error / norm**2 * x / x.norm(dim=1, keepdim=True) / len(x)
    torch.testing.assert_close(with_norm - without_norm, of_norm)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("normalization", ["published", *SCALE_FREE])
def test_gradients_are_finite_differences(normalization, architecture):
    head, x = head_with(normalization, architecture), tokens(7).requires_grad_()
    # JumpReLU's thresholds are trained by other estimators; a gated head's S is not to bend W_dec
    without = {"jumprelu": "log_threshold", "gated": "W_dec"}.get(architecture)
    parameters = {name: p for name, p in head.named_parameters() if name != without}

    def value():
        if architecture == "gated":  # A has a value that comes from frozen parts
            losses = head.losses(x)
            return losses.reconstruction + losses.sparsity
        return site_term(head, x).value

    gradients = torch.autograd.grad(value(), [x, *parameters.values()])
    generator = torch.Generator().manual_seed(0)
    for tensor, gradient in zip([x, *parameters.values()], gradients, strict=True):
        direction = torch.randn(tensor.shape, dtype=x.dtype, generator=generator)
        at = []
        with torch.no_grad():
            for step in (1e-8, -2e-8):  # a longer one may wake a latent
                tensor.add_(step * direction)
                at.append(value())
            tensor.add_(1e-8 * direction)
        expected = (gradient * direction).sum()
        torch.testing.assert_close((at[0] - at[1]) / 2e-8, expected, rtol=1e-4, atol=1e-6)


def test_variance_divides_by_the_batch_in_training_and_a_running_spread_after():
    head, x = head_with("variance"), tokens()
    spread = (x - x.mean(dim=0)).square().mean().sqrt()
    read = head.normalise(x)
    torch.testing.assert_close(read.x, x / spread)
    torch.testing.assert_close(head.scale.double(), spread, rtol=1e-6, atol=0)
    head.normalise(2 * x)
    head.eval()
    expected = 0.99 * spread + 0.01 * 2 * spread
    torch.testing.assert_close(head.normalise(x[:1]).scale.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{"tied": True}, {"normalization": "variance"}])
def test_weights_for_inference_stand_alone(options):
    """What SAELens gets reads raw activations, with an encoder of its own."""
    head, x = head_with(**{"normalization": "published"} | options), tokens()
    head.losses(x)
    head.eval()
    weights = head.inference_weights()
    features = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    torch.testing.assert_close(features, head.encode(x))
    x_hat = features @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(x_hat, head(x))


# ---- which tokens, which sites, how much ----


def test_a_random_share_of_the_tokens_has_the_expectation_of_all():
    heads, x = HeadBank([head_with("layer_norm", auxk=0)]), tokens(40)[None]
    exact = regularization(heads, {SITES[0]: x}).term
    drawn = torch.stack(
        [
            regularization(heads, {SITES[0]: x}, kept=random_tokens(40, 0.25, (step, 0))).term
            for step in range(600)
        ]
    ).detach()
    assert (drawn.mean() - exact).abs() < 4 * drawn.std() / math.sqrt(len(drawn))
    assert drawn.std() > 0


def test_no_two_processes_draw_the_same_tokens_and_a_resumed_step_draws_them_again():
    draws = {
        (step, draw): tuple(random_tokens(1000, 0.125, (step, draw)).tolist())
        for step in range(5)
        for draw in range(4)
    }
    assert len(set(draws.values())) == len(draws)
    assert all(len(set(kept)) == 125 for kept in draws.values())
    assert tuple(random_tokens(1000, 0.125, (3, 2)).tolist()) == draws[3, 2]


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_sites_take_turns_and_each_gets_the_same(number):
    names = [f"blocks.{i}.hook_resid_pre" for i in range(5)]
    options = TermOptions(sites_per_step=number)
    counts = Counter(name for step in range(5) for name in options.sites_of_step(names, step))
    assert counts == dict.fromkeys(names, number)
    assert all(len(options.sites_of_step(names, step)) == number for step in range(5))


def test_warmup_is_linear_between_its_steps():
    options = TermOptions(term_warmup=[2, 6])
    assert [options.warmup_factor(step) for step in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [TermOptions(term_warmup=[3, 3]).warmup_factor(step) for step in range(4)] == [
        0,
        0,
        1,
        1,
    ]
    assert TermOptions().warmup_factor(0) == 1


@pytest.mark.parametrize(
    "options, culprit",
    [
        ({"token_fraction": 0.0}, "token_fraction"),
        ({"token_fraction": 1.5}, "token_fraction"),
        ({"token_fraction": math.nan}, "token_fraction"),
        ({"sites_per_step": 0}, "sites_per_step"),
        ({"splice_sites": 0}, "splice_sites"),
        ({"splice_weight": -1.0}, "splice_weight"),
        ({"splice_weight": math.nan}, "splice_weight"),
        ({"splice_loss": "mse"}, "splice_loss"),
        ({"term_warmup": [3]}, "term_warmup"),
        ({"term_warmup": [3, 2]}, "term_warmup"),
    ],
)
def test_impossible_options_are_refused_by_name(options, culprit):
    with pytest.raises(HeadConfigError, match=culprit):
        TermOptions(**options)


def test_more_sites_than_heads_are_refused(plain_model, head_configs):
    with pytest.raises(HeadConfigError, match="only 3 sites"):
        plain_model.attach_heads(head_configs, TermOptions(sites_per_step=4))


# ---- the spliced loss ----


def in_training(model, head_configs, **options):
    model.attach_heads(head_configs, TermOptions(**options))
    return model.double().train()


@pytest.mark.parametrize("splice_loss", ["ce", "kl"])
def test_the_spliced_loss_is_that_of_reconstructions_in_the_stream(
    plain_model, head_configs, input_ids, by_hand, splice_loss
):
    model = in_training(plain_model, head_configs, splice_weight=0.5, splice_loss=splice_loss)
    output = model(input_ids, labels=input_ids)
    plain = by_hand(model, input_ids)[1][:, :-1].flatten(0, 1)
    patches = {head.config.hook_name: head for head in model.heads}
    spliced = by_hand(model, input_ids, patches)[1][:, :-1].flatten(0, 1)
    if splice_loss == "ce":
        expected = cross_entropy(spliced, input_ids[:, 1:].flatten())
    else:
        logs = (spliced.log_softmax(-1), plain.log_softmax(-1))
        expected = kl_div(*logs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(output.spliced_loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert output.spliced_loss > (output.loss if splice_loss == "ce" else 0)


def test_heads_and_model_both_learn_from_the_spliced_loss(plain_model, head_configs, input_ids):
    model = in_training(plain_model, head_configs, splice_weight=0.5)
    model(input_ids, labels=input_ids).spliced_loss.backward()
    assert model.heads[SITES[0]].W_dec.grad.any()
    assert model.transformer.wte.weight.grad.any()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.any()


def test_kl_does_not_pull_the_plain_output_towards_the_spliced_one(
    plain_model, head_configs, input_ids
):
    model = in_training(plain_model, head_configs, splice_weight=0.5, splice_loss="kl")
    output = model(input_ids, labels=input_ids)
    through_logits = torch.autograd.grad(
        output.spliced_loss, output.logits, retain_graph=True, allow_unused=True
    )
    assert through_logits == (None,)


def test_padding_has_no_part_in_the_spliced_loss(plain_model, head_configs, input_ids):
    model = in_training(plain_model, head_configs, splice_weight=0.5)
    padded = torch.cat([input_ids, torch.full((3, 4), 7)], dim=1)
    mask = (torch.arange(14) < 10).long().expand(3, -1)
    labels = torch.where(mask.bool(), padded, -100)
    expected = model(input_ids, labels=input_ids).spliced_loss
    found = model(padded, attention_mask=mask, labels=labels).spliced_loss
    torch.testing.assert_close(found, expected)


def test_spliced_sites_are_drawn_evenly_and_alike_on_every_process():
    options = TermOptions(splice_sites=2)
    counts = Counter(name for step in range(600) for name in options.spliced_sites(SITES, step))
    assert all(340 < counts[site] < 460 for site in SITES)
    assert options.spliced_sites(SITES, 7) == TermOptions(splice_sites=2).spliced_sites(SITES, 7)


def test_evaluation_pays_for_no_second_pass(plain_model, head_configs, input_ids):
    model = in_training(plain_model, head_configs, splice_weight=0.5).eval()
    assert model(input_ids, labels=input_ids).spliced_loss is None


def test_heads_in_bfloat16_beside_a_model_in_float32(plain_model, head_configs, input_ids):
    plain_model.attach_heads(head_configs, TermOptions(term_bf16=True))
    model = plain_model.train()
    exact = model.eval()(input_ids, labels=input_ids)
    rounded = model.train()(input_ids, labels=input_ids)
    assert rounded.loss.dtype == torch.float32
    assert rounded.logits.equal(exact.logits)
    assert rounded.term != exact.term
    torch.testing.assert_close(rounded.term, exact.term, rtol=0.01, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.eval()(input_ids, labels=input_ids)
    assert autocast.logits.dtype == torch.bfloat16  # which the option leaves alone
