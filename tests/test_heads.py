import math

import pytest
import torch
from conftest import load_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from hf_saereg.errors import UserError
from hf_saereg.heads import HeadConfigError, SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank

SITE = "blocks.0.hook_resid_pre"
EXACT = {"rtol": 1e-10, "atol": 1e-10}

kernels = pytest.mark.parametrize("kernel", ["dense", "sparse"])
families = pytest.mark.parametrize(
    "options",
    [{"architecture": "standard", "sparsity_coefficient": 0.3}, {"architecture": "topk", "k": 4}],
    ids=lambda options: options["architecture"],
)


def random_head(options, d_in=16, d_sae=48, dtype=torch.float64):
    """A head whose parameters are all different from zero."""
    torch.manual_seed(0)
    head = make_head(SAEHeadConfig(hook_name=SITE, d_in=d_in, d_sae=d_sae, **options)).to(dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return head


def random_tokens(tokens=40, d_in=16, dtype=torch.float64, seed=1):
    return torch.randn(tokens, d_in, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def published(parity_folder):
    path = parity_folder / "standard.safetensors"
    with safe_open(path, "pt") as file:
        coefficient = float(file.metadata()["coefficient"])
    tensors = load_file(path)
    d_in, d_sae = tensors["param.W_enc"].shape
    head = make_head(SAEHeadConfig("standard", SITE, d_in, d_sae, coefficient)).double()
    load_parameters(head, {n: tensors[f"param.{n}"] for n, _ in head.named_parameters()})
    return head, tensors


def test_standard_head_encodes_and_decodes_as_published(published):
    head, tensors = published
    features = head.encode(tensors["x"])
    torch.testing.assert_close(features, tensors["features"], **EXACT)
    torch.testing.assert_close(head.decode(features), tensors["reconstructed"], **EXACT)
    torch.testing.assert_close(head(tensors["x"]), tensors["reconstructed"], **EXACT)


@kernels
def test_standard_head_has_the_published_losses(published, kernel):
    head, tensors = published
    head.kernel = kernel
    x = tensors["x"].flatten(0, 1)
    losses = head.losses(x)
    for name in ("reconstruction", "sparsity", "auxiliary"):
        torch.testing.assert_close(getattr(losses, name), tensors[f"loss.{name}"], **EXACT)
    assert losses.statistics.l0 == pytest.approx(tensors["loss.l0"].item(), abs=1e-6)
    assert losses.statistics.mean_norm == pytest.approx(tensors["loss.x_norm"].item(), abs=1e-10)
    x_hat = head.reconstruct(x).x_hat.view_as(tensors["x"])
    torch.testing.assert_close(x_hat, tensors["reconstructed"], **EXACT)


@kernels
def test_standard_head_has_the_published_gradients(published, kernel):
    head, tensors = published
    head.kernel = kernel
    x = tensors["x"].clone().requires_grad_()
    losses = head.losses(x.flatten(0, 1))
    (losses.reconstruction + losses.sparsity + losses.auxiliary).backward()
    torch.testing.assert_close(x.grad, tensors["grad.x"], **EXACT)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"grad.{name}"], **EXACT, msg=name)


def brute_force_topk(head, x):
    """Features of a TopK head, one token at a time."""
    rows = []
    for row in x:
        pre = (row - head.b_dec) @ head.W_enc + head.b_enc
        kept = sorted(range(len(pre)), key=lambda j: pre[j].item(), reverse=True)[: head.config.k]
        rows.append(torch.stack([torch.relu(p) if j in kept else p * 0 for j, p in enumerate(pre)]))
    return torch.stack(rows)


@kernels
@pytest.mark.parametrize("k", [1, 4, 40, 48])
def test_topk_keeps_the_k_largest_and_never_a_negative_one(kernel, k):
    head = random_head({"architecture": "topk", "k": k})
    head.kernel = kernel
    x = random_tokens(12).requires_grad_()
    features = brute_force_topk(head, x)
    error = (x - features @ head.W_dec - head.b_dec).square().sum(dim=-1).mean()
    expected = torch.autograd.grad(error, [x, *head.parameters()])
    assert features.min() == 0

    losses = head.losses(x)
    torch.testing.assert_close(head.encode(x), features, **EXACT)
    torch.testing.assert_close(losses.reconstruction, error, **EXACT)
    assert losses.sparsity == losses.auxiliary == 0
    assert losses.statistics.l0 == pytest.approx((features > 0).sum().item() / 12)
    found = torch.autograd.grad(losses.reconstruction, [x, *head.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_topk_is_the_published_one_but_for_negative_features(parity_folder):
    tensors = load_file(parity_folder / "topk.safetensors")
    d_in, d_sae = tensors["param.W_enc"].shape
    k = int((tensors["features"][0, 0] != 0).sum())
    head = make_head(SAEHeadConfig("topk", SITE, d_in, d_sae, k=k)).double()
    load_parameters(head, {n: tensors[f"param.{n}"] for n, _ in head.named_parameters()})
    torch.testing.assert_close(head.encode(tensors["x"]), tensors["features"].relu(), **EXACT)


@families
@pytest.mark.parametrize(("d_in", "d_sae"), [(16, 48), (64, 512), (7, 5), (1, 1024)])
def test_initialisation_is_the_published_one(options, d_in, d_sae):
    torch.manual_seed(0)
    head = make_head(SAEHeadConfig(hook_name=SITE, d_in=d_in, d_sae=d_sae, **options))
    bound = math.sqrt(6 / d_in)
    assert torch.equal(head.W_enc, head.W_dec.T)
    assert head.W_enc.data_ptr() != head.W_dec.data_ptr()
    assert head.W_dec.abs().max() <= bound
    assert head.W_dec.max() > 0.8 * bound
    assert head.W_dec.min() < -0.8 * bound
    assert not head.b_enc.any()
    assert not head.b_dec.any()


@families
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)])
def test_encode_and_decode_take_any_leading_shape(options, shape):
    head = random_head(options)
    x = torch.randn(shape, dtype=torch.float64)
    features = head.encode(x)
    assert features.shape == (*shape[:-1], 48)
    assert head.decode(features).shape == shape
    alone = [head.encode(row) for row in x.reshape(-1, 16)]
    if alone:
        torch.testing.assert_close(features.reshape(-1, 48), torch.stack(alone))


@kernels
@families
def test_no_tokens_cost_nothing_and_leave_zero_gradients(options, kernel):
    head = random_head(options)
    head.kernel = kernel
    losses = head.losses(random_tokens(0))
    total = losses.reconstruction + losses.sparsity + losses.auxiliary
    assert total == 0
    total.backward()
    assert all(not parameter.grad.any() for parameter in head.parameters())
    assert losses.statistics.tokens == 0
    assert not losses.statistics.fired.any()


@families
def test_losses_are_computed_in_the_dtype_of_the_parameters(options):
    head = random_head(options, dtype=torch.float32)
    losses = head.losses(random_tokens(dtype=torch.bfloat16))
    assert losses.reconstruction.dtype == torch.float32
    exact = head.losses(random_tokens(dtype=torch.bfloat16).float())
    assert losses.reconstruction == exact.reconstruction


@families
def test_statistics_are_what_their_names_say(options):
    head, x = random_head(options), random_tokens()
    features = head.encode(x)
    statistics = head.losses(x).statistics
    assert statistics.l0 == pytest.approx((features > 0).sum(dim=-1).double().mean().item())
    assert statistics.dead_fraction == pytest.approx(
        (features == 0).all(dim=0).double().mean().item()
    )
    assert statistics.mean_norm == pytest.approx(x.norm(dim=-1).mean().item())
    residual = (x - head(x)).square().sum()
    variance = (x - x.mean(dim=0)).square().sum()
    assert statistics.fvu == pytest.approx((residual / variance).item())
    assert not any(tensor.requires_grad for tensor in statistics)


@settings(deadline=None, max_examples=100)
@given(
    offset=st.floats(-100, 100),  # in standard deviations
    scale=st.floats(0.01, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_predicting_the_mean_leaves_all_variance_unexplained(offset, scale, dtype):
    x = (random_tokens(200, dtype=dtype) + offset) * scale
    head = random_head({"architecture": "standard"}, dtype=dtype)
    with torch.no_grad():
        head.b_enc.fill_(-1e6)  # nothing fires
        head.b_dec.copy_(x.double().mean(dim=0))
    statistics = head.losses(x).statistics
    assert statistics.l0 == 0
    assert statistics.dead_fraction == 1
    # sums are rounded in the dtype of x, and their difference magnifies that by mean² / variance
    rounding = 4 * torch.finfo(dtype).eps * (1 + offset**2)
    assert statistics.fvu == pytest.approx(1, abs=rounding + 1e-12)


@families
def test_statistics_of_parts_merge_to_those_of_the_whole(options):
    head, x = random_head(options), random_tokens(60)
    whole = head.losses(x).statistics
    parts = [head.losses(part).statistics for part in x.split([1, 40, 0, 19])]
    merged = parts[0].merged(parts[1]).merged(parts[2]).merged(parts[3])
    for ours, theirs in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert merged.tokens == 60
    assert merged.fvu == pytest.approx(whole.fvu)


@families
@pytest.mark.parametrize("scale", [0.01, 1.0, 7.3])
def test_folded_head_reads_raw_activations_as_the_head_reads_scaled_ones(options, scale):
    head, x = random_head(options), random_tokens()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    folded = head.folded(scale)
    torch.testing.assert_close(folded.encode(x), head.encode(scale * x), **EXACT)
    torch.testing.assert_close(folded(x), head(scale * x) / scale, **EXACT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    assert folded.W_enc.dtype == head.W_enc.dtype


@families
def test_folded_head_keeps_the_kernel_that_was_forced(options):
    head = random_head(options)
    head.kernel = "dense"
    assert head.folded(2.0).kernel == "dense"


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"architecture": "gatd"}, "gatd"),
        ({"architecture": "standard", "d_sae": 0}, "d_sae"),
        ({"architecture": "standard", "d_sae": -4}, "d_sae"),
        ({"architecture": "standard", "d_in": 0}, "d_in"),
        ({"architecture": "standard", "sparsity_coefficient": -0.1}, "sparsity_coefficient"),
        ({"architecture": "standard", "sparsity_coefficient": math.nan}, "sparsity_coefficient"),
        ({"architecture": "standard", "reconstruction_weight": -1.0}, "reconstruction_weight"),
        ({"architecture": "standard", "reconstruction_weight": math.inf}, "reconstruction_weight"),
        ({"architecture": "topk"}, "k at"),
        ({"architecture": "topk", "k": 0}, "k at"),
        ({"architecture": "topk", "k": 33}, "d_sae (32)"),
    ],
)
def test_impossible_head_is_refused_by_name(options, culprit):
    with pytest.raises(HeadConfigError) as caught:
        make_head(SAEHeadConfig(**{"hook_name": SITE, "d_in": 8, "d_sae": 32, **options}))
    assert culprit in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_bank_holds_heads_of_any_size_by_hook_name_in_order():
    names = ["blocks.0.hook_resid_pre", "blocks.7.hook_resid_pre", "blocks.11.hook_resid_post"]
    sizes = [3, 70, 16]
    heads = [
        make_head(SAEHeadConfig("standard", name, 8, d_sae))
        for name, d_sae in zip(names, sizes, strict=True)
    ]
    bank = HeadBank(heads)
    assert bank.hook_names == names
    assert [config.d_sae for config in bank.configs] == sizes
    assert [bank[name] for name in names] == list(bank) == heads
    assert len(bank) == 3
    assert len(list(bank.parameters())) == 12
    assert len(HeadBank()) == 0


def test_bank_refuses_two_heads_on_one_site():
    heads = [make_head(SAEHeadConfig("standard", SITE, 8, 16)) for _ in range(2)]
    with pytest.raises(HeadConfigError, match=SITE):
        HeadBank(heads)
