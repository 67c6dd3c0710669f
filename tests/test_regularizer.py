import json

import pytest
import torch
from conftest import load_parameters
from safetensors import safe_open
from safetensors.torch import load_file

from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.regularizer import regularization

EXACT = {"rtol": 1e-10, "atol": 1e-10}
N_SITES = 3

kernels = pytest.mark.parametrize("kernel", ["dense", "sparse"])


@pytest.fixture
def published(parity_folder):
    """Heads, activations by hook name, and the tensors of the published term."""
    path = parity_folder / "regularization_term.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    heads = []
    for i, coefficient in enumerate(json.loads(metadata["sparsity"])):
        d_in, d_sae = tensors[f"param.{i}.W_enc"].shape
        config = SAEHeadConfig(
            "standard",
            f"blocks.{i}.hook_resid_pre",
            d_in,
            d_sae,
            coefficient,
            reconstruction_weight=float(metadata["lambda"]),
        )
        head = make_head(config).double()
        load_parameters(head, {n: tensors[f"param.{i}.{n}"] for n, _ in head.named_parameters()})
        heads.append(head)
    activations = {
        f"blocks.{i}.hook_resid_pre": tensors[f"x.{i}"].clone().requires_grad_()
        for i in range(N_SITES)
    }
    return HeadBank(heads), activations, tensors


def use_kernel(heads, kernel):
    for head in heads:
        head.kernel = kernel


@kernels
def test_term_is_the_published_one(published, kernel):
    heads, activations, tensors = published
    use_kernel(heads, kernel)
    term, sites = regularization(heads, activations)
    torch.testing.assert_close(term, tensors["term"], **EXACT)
    assert len(sites) == N_SITES
    for i, site in enumerate(sites.values()):
        torch.testing.assert_close(site.value, tensors[f"term.{i}"], **EXACT)


@kernels
def test_term_has_the_published_gradients(published, kernel):
    heads, activations, tensors = published
    use_kernel(heads, kernel)
    regularization(heads, activations).term.backward()
    for i, (head, x) in enumerate(zip(heads, activations.values(), strict=True)):
        torch.testing.assert_close(x.grad, tensors[f"grad.x.{i}"], **EXACT)
        for name, parameter in head.named_parameters():
            expected = tensors[f"grad.{i}.{name}"]
            torch.testing.assert_close(parameter.grad, expected, **EXACT, msg=f"{i} {name}")


@kernels
def test_masked_positions_count_for_nothing(published, kernel):
    heads, activations, _ = published
    use_kernel(heads, kernel)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, :3], mask[1, 7:], mask[2] = 0, 0, 0
    kept = {name: x.detach()[mask.bool()][None] for name, x in activations.items()}
    expected = regularization(heads, kept)
    soiled = {
        name: x.detach().masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
        for name, x in activations.items()
    }
    found = regularization(heads, soiled, mask)
    torch.testing.assert_close(found.term, expected.term, **EXACT)
    for name in soiled:
        theirs = expected.sites[name].losses.statistics
        for a, b in zip(found.sites[name].losses.statistics, theirs, strict=True):
            torch.testing.assert_close(a, b)
    found.term.backward()
    for x in soiled.values():
        assert not x.grad[mask == 0].any()
        assert x.grad[mask == 1].any()


@kernels
def test_batch_of_padding_costs_nothing_and_reaches_every_parameter(published, kernel):
    heads, activations, _ = published
    use_kernel(heads, kernel)
    term = regularization(heads, activations, torch.zeros(4, 10)).term
    assert term == 0
    term.backward()
    for parameter in [*heads.parameters(), *activations.values()]:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_term_is_the_mean_over_the_sites_that_have_a_head(published):
    heads, activations, tensors = published
    some = HeadBank([heads["blocks.2.hook_resid_pre"], heads["blocks.0.hook_resid_pre"]])
    term = regularization(some, activations).term
    torch.testing.assert_close(term, (tensors["term.0"] + tensors["term.2"]) / 2, **EXACT)


def test_zero_activations_give_a_finite_term_and_gradients():
    head = make_head(SAEHeadConfig("standard", "blocks.0.hook_resid_pre", 4, 8, 0.1))
    x = torch.zeros(1, 3, 4, requires_grad=True)
    mixed = torch.cat([x, torch.ones(1, 1, 4)], dim=1)
    regularization(HeadBank([head]), {"blocks.0.hook_resid_pre": mixed}).term.backward()
    assert x.grad.isfinite().all()
