"""What training does beside the gradient: starting points, dead latents, norms of the decoder."""

import pytest
import torch

from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.auxk import DeadReaders, auxk_loss
from hf_saereg.heads.health import centre, forget, resample

SITE = "blocks.0.hook_resid_pre"


def head_with(architecture="topk", **options):
    torch.manual_seed(0)
    if architecture in ("topk", "batchtopk"):
        options = {"k": 3} | options
    return make_head(SAEHeadConfig(architecture, SITE, 8, 20, **options)).double()


def own(head):
    return DeadReaders(head.W_enc, head.b_enc, head.W_dec)


def test_the_geometric_median_ignores_an_outlier_that_moves_the_mean():
    x = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = 1e6
    assert centre(x, "mean").norm() > 1e3
    median = centre(x, "geometric_median")
    assert median.norm() < 0.3
    unit_vectors = (x - median) / (x - median).norm(dim=1, keepdim=True)
    assert unit_vectors.sum(dim=0).norm() < 0.01  # the gradient of the mean distance vanishes
    assert not centre(x, "zero").any()


def test_a_token_in_the_middle_of_the_median_does_no_harm():
    x = torch.tensor([[0.0], [0.0], [0.0], [5.0]])
    torch.testing.assert_close(centre(x, "geometric_median"), torch.zeros(1), atol=1e-3, rtol=0)


def test_a_latent_is_dead_once_it_has_not_fired_on_so_many_tokens():
    head = head_with(dead_after_tokens=250)
    fired = torch.zeros(20, dtype=torch.int64)
    fired[3] = 7
    for step in range(3):
        assert not head.dead.any()
        head.observe(fired if step == 1 else fired * 0, torch.tensor(100))
    assert head.dead.tolist() == [i != 3 for i in range(20)]
    assert head.tokens_since_fired[3] == 100


def test_unit_decoder_norms_hold_from_the_first_step_on():
    head = head_with("standard", unit_decoder_norm=True)
    ones = torch.ones(20, dtype=torch.float64)
    torch.testing.assert_close(head.W_dec.norm(dim=1), ones)
    head.W_dec.data.mul_(3)
    head.observe(torch.zeros(20), torch.tensor(1))
    torch.testing.assert_close(head.W_dec.norm(dim=1), ones)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_auxk_is_the_formula_of_the_paper(architecture):
    head = head_with(architecture, auxk=4)
    head.b_enc.data.normal_()
    head.tokens_since_fired[5:15] = 10**9
    x = torch.randn(30, 8, dtype=torch.float64)
    error = (x - head(x)).detach()
    expected = 0
    for token, its_error in zip(x, error, strict=True):
        pre = (token - head.b_dec) @ head.W_enc + head.b_enc
        largest = sorted(range(5, 15), key=lambda latent: -pre[latent].item())[:4]
        error_hat = sum(pre[latent].clamp(min=0) * head.W_dec[latent] for latent in largest)
        expected = expected + (its_error - error_hat).square().sum() / 32
    torch.testing.assert_close(auxk_loss(head, own(head), x - head.b_dec, error), expected)
    torch.testing.assert_close(head.losses(x).auxiliary * 30, expected)
    assert head.eval().losses(x).auxiliary == 0


def test_auxk_reaches_the_dead_and_nobody_else():
    head = head_with(auxk=4)
    head.tokens_since_fired[5:15] = 10**9
    x = torch.randn(30, 8, dtype=torch.float64)
    auxk_loss(head, own(head), x - head.b_dec.detach(), x).backward()
    assert head.W_dec.grad[5:15].any() and head.W_enc.grad[:, 5:15].any()
    assert not head.W_dec.grad[:5].any() and not head.W_enc.grad[:, 15:].any()


def test_auxk_of_no_token_is_nothing():
    head = head_with(auxk=4)
    head.tokens_since_fired[5:15] = 10**9
    auxiliary = head.losses(torch.zeros(0, 8, dtype=torch.float64)).auxiliary
    auxiliary.backward()
    assert auxiliary == 0 and not head.W_dec.grad.any()


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_a_resampled_latent_points_at_badly_reconstructed_tokens_and_fires(architecture):
    head = head_with(architecture)
    optimizer = torch.optim.Adam(head.parameters())
    x = torch.randn(500, 8, dtype=torch.float64)
    head.encoder_bias.data[:10] = -1e3  # where the bias is the gate's, of the gate
    head.tokens_since_fired[:10] = 10**9
    losses = head.losses(x)
    (losses.reconstruction + losses.auxiliary).backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    assert resample(head, x, torch.Generator().manual_seed(0), optimizer) == 10
    assert not head.dead.any()
    torch.testing.assert_close(head.W_dec[:10].norm(dim=1), torch.ones(10, dtype=torch.float64))
    aligned = torch.cosine_similarity(head.W_dec[:10], head.W_enc.T[:10])
    torch.testing.assert_close(aligned, torch.ones_like(aligned))
    for name, parameter in head.named_parameters():
        rest = parameter[:, 10:] if name == "W_enc" else parameter[10:]
        was = before[name][:, 10:] if name == "W_enc" else before[name][10:]
        if name != "b_dec":
            assert torch.equal(rest, was), name
    assert not optimizer.state[head.W_dec]["exp_avg"][:10].any()
    assert optimizer.state[head.W_dec]["exp_avg"][10:].any()
    if architecture != "topk":  # where other latents may always be larger
        assert (head.encode(x)[:, :10] != 0).any(dim=0).all()


def test_forgotten_latents_keep_their_weights_and_nothing_else():
    head = head_with("standard")
    optimizer = torch.optim.Adam(head.parameters())
    x = torch.randn(50, 8, dtype=torch.float64)
    losses = head.losses(x)
    (losses.reconstruction + losses.sparsity).backward()
    optimizer.step()
    head.tokens_since_fired.fill_(7)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    forget(head, torch.tensor([2, 5]), optimizer)
    assert head.tokens_since_fired.tolist() == [0 if i in (2, 5) else 7 for i in range(20)]
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for parameter, of_latents in ((head.W_dec, [2, 5]), (head.W_enc, (slice(None), [2, 5]))):
        moment = optimizer.state[parameter]["exp_avg_sq"]
        assert moment.any() and not moment[of_latents].any()
    assert optimizer.state[head.b_dec]["exp_avg_sq"].all()


def test_an_origin_as_long_as_there_are_latents_is_no_latents():
    head = make_head(SAEHeadConfig("standard", SITE, 8, 8))
    head.b_dec.data.fill_(0.5)
    head.tokens_since_fired[:3] = 10**9
    optimizer = torch.optim.Adam(head.parameters())
    assert resample(head, torch.randn(50, 8), torch.Generator().manual_seed(0), optimizer) == 3
    assert (head.b_dec == 0.5).all()


def test_a_head_that_died_altogether_comes_back():
    head = head_with("standard")
    head.b_enc.data.fill_(-1e3)
    head.tokens_since_fired[:] = 10**9
    x = torch.randn(50, 8, dtype=torch.float64)
    optimizer = torch.optim.Adam(head.parameters())
    assert resample(head, x, torch.Generator().manual_seed(0), optimizer) == 20
    assert all(parameter.isfinite().all() for parameter in head.parameters())
    assert (head.encode(x) != 0).any(dim=0).all()


@pytest.mark.parametrize(
    "head", [head_with("batchtopk"), head_with("standard", normalization="variance")], ids=str
)
def test_running_averages_do_not_see_the_tokens_of_a_resampling(head):
    x = torch.randn(50, 8, dtype=torch.float64)
    head.losses(x)
    head.tokens_since_fired[:3] = 10**9
    names = ("running_threshold", "scale")
    before = {name: b.clone() for name, b in head.named_buffers() if name in names}
    resample(head, 3 * x, torch.Generator().manual_seed(0), torch.optim.Adam(head.parameters()))
    assert before and head.training
    for name, buffer in before.items():
        assert torch.equal(head.get_buffer(name), buffer)


def test_without_tokens_nothing_is_resampled():
    head = head_with()
    head.tokens_since_fired[:3] = 10**9
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    x, optimizer = torch.zeros(0, 8), torch.optim.Adam(head.parameters())
    assert resample(head, x, torch.Generator(), optimizer) == 0
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)


def test_without_dead_latents_nothing_is_resampled():
    head = head_with()
    before = head.W_dec.detach().clone()
    optimizer = torch.optim.Adam(head.parameters())
    assert resample(head, torch.randn(9, 8), torch.Generator(), optimizer) == 0
    assert torch.equal(head.W_dec, before)
