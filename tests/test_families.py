"""Every family by name: parity with the published code, both kernels alike, files that reload."""

import pytest
import torch
from conftest import load_parameters
from safetensors.torch import load_file

from hf_saereg.heads import FAMILIES, HeadConfigError, SAEHeadConfig, make_head
from hf_saereg.heads.folder import load_head, save_heads

SITE = "blocks.0.hook_resid_pre"
NAMES = {"W_gate": "W_enc", "jumprelu.log_threshold": "log_threshold"}


def trained_like(architecture, dtype=torch.float64, **options):
    torch.manual_seed(0)
    sparsity = {FAMILIES[architecture].sparsity_option: 6}
    head = make_head(SAEHeadConfig(architecture, SITE, 16, 48, **sparsity | options)).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def losses_and_gradients(head, x):
    head.zero_grad()
    x = x.clone().requires_grad_()
    losses = head.losses(x)
    parts = (losses.reconstruction, losses.sparsity, losses.auxiliary)
    sum(parts).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    return parts, {**gradients, "x": x.grad}


# the published code casts the step function of JumpReLU to float32
@pytest.mark.parametrize(
    "architecture, options, tolerance",
    [
        ("gated", {"sparsity_coefficient": 0.07}, 1e-10),
        ("jumprelu", {"sparsity_coefficient": 0.07, "reference_window": True}, 1e-6),
        ("topk", {"k": 6, "rectified": False}, 1e-10),
    ],
)
@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_parity_with_the_published_code(parity_folder, architecture, options, tolerance, kernel):
    tensors = load_file(parity_folder / f"{architecture}.safetensors")
    head = make_head(SAEHeadConfig(architecture, SITE, 16, 48, **options)).double()
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("param.")}
    load_parameters(head, {NAMES.get(name, name): w for name, w in weights.items()})
    head.kernel = kernel
    x = tensors["x"].flatten(0, 1)
    parts, gradients = losses_and_gradients(head, x)
    close = {"rtol": tolerance, "atol": tolerance}
    for part, name in zip(parts, ("reconstruction", "sparsity", "auxiliary"), strict=True):
        torch.testing.assert_close(part.detach(), tensors[f"loss.{name}"], **close)
    torch.testing.assert_close(head.encode(x), tensors["features"].flatten(0, 1), **close)
    expected = {k[5:]: v for k, v in tensors.items() if k.startswith("grad.")}
    assert {NAMES.get(name, name) for name in expected} == gradients.keys()
    for name, gradient in expected.items():
        found = gradients[NAMES.get(name, name)]
        torch.testing.assert_close(found, gradient.reshape(found.shape), **close)


OPTIONS = [
    *((architecture, {}) for architecture in FAMILIES),
    *((architecture, {"normalization": "layer_norm"}) for architecture in FAMILIES),
    *((architecture, {"normalization": "variance"}) for architecture in FAMILIES),
    *((architecture, {"unit_decoder_norm": True}) for architecture in FAMILIES),
    *((architecture, {"tied": True}) for architecture in ("standard", "gated")),
    *((architecture, {"auxk": 5}) for architecture in ("topk", "batchtopk")),
    ("jumprelu", {"bandwidth": 0.5}),
    ("jumprelu", {"quadratic_penalty": True, "target_l0": 10}),
]


@pytest.mark.parametrize("architecture, options", OPTIONS, ids=str)
def test_the_sparse_kernel_gives_the_dense_losses_and_gradients(architecture, options):
    head, x = trained_like(architecture, **options), torch.randn(100, 16, dtype=torch.float64)
    head.tokens_since_fired[::3] = 10**9  # a third of the latents is dead
    results = []
    for head.kernel in ("dense", "sparse"):
        results.append(losses_and_gradients(head, x))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-10)


def test_the_windows_of_paper_and_reference_differ_in_the_threshold_alone():
    x = torch.randn(100, 16, dtype=torch.float64)
    paper = losses_and_gradients(trained_like("jumprelu"), x)[1]
    reference = losses_and_gradients(trained_like("jumprelu", reference_window=True), x)[1]
    assert not torch.allclose(paper.pop("log_threshold"), reference.pop("log_threshold"))
    torch.testing.assert_close(paper, reference)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_head_reloads_to_the_bit(architecture, tmp_path):
    head = trained_like(architecture, torch.float32)
    head.losses(torch.randn(50, 16))  # sets the running threshold of batchtopk
    save_heads([head], tmp_path)
    reloaded = load_head(tmp_path, SITE)
    assert reloaded.config == head.config
    for name, tensor in head.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


def test_batchtopk_lets_k_a_token_pass_on_average_and_a_threshold_in_evaluation():
    head, x = trained_like("batchtopk"), torch.randn(100, 16, dtype=torch.float64)
    assert head.losses(x).statistics.l0 == 6
    counts = (head.encode(x) > 0).sum(dim=-1)
    assert counts.min() < 6 < counts.max()
    head.eval()
    alone = torch.cat([head.encode(token[None]) for token in x])
    torch.testing.assert_close(head.encode(x), alone)
    assert (alone[alone > 0] > head.running_threshold).all()


def test_a_raw_topk_head_has_no_saelens_form(tmp_path):
    with pytest.raises(HeadConfigError, match="rectified"):
        save_heads([trained_like("topk", rectified=False)], tmp_path)


def test_a_window_needs_a_width():
    with pytest.raises(HeadConfigError, match="bandwidth"):
        trained_like("jumprelu", bandwidth=0.0)


def test_a_head_saved_over_one_of_another_family_leaves_nothing_of_it(tmp_path):
    save_heads([trained_like("jumprelu")], tmp_path)
    save_heads([trained_like("standard")], tmp_path)
    assert load_head(tmp_path, SITE).config.architecture == "standard"
