"""Heads with random weights, and what they compute by one kernel beside another."""

import torch

from hf_saereg.heads import SAEHead, SAEHeadConfig, make_head


def head_and_tokens(
    architecture, tokens, d_in, d_sae, k=1, seed=0, dtype=torch.float64, device="cpu", **options
):
    torch.manual_seed(seed)
    options = {"sparsity_coefficient": 0.3, "k": k} | options
    head = make_head(SAEHeadConfig(architecture, "a site", d_in, d_sae, **options)).to(dtype)
    with torch.no_grad():
        for bias in (head.encoder_bias, head.b_dec):
            bias.normal_()
    return head.to(device), torch.randn(tokens, d_in, dtype=dtype).to(device)


def losses_and_gradients(head: SAEHead, x, kernel, autocast=False):
    """The three losses, then the gradients of x and of every parameter."""
    head.kernel = kernel
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        losses = head.losses(x)
        parts = losses.reconstruction, losses.sparsity, losses.auxiliary
    gradients = torch.autograd.grad(sum(parts), [x, *head.parameters()], materialize_grads=True)
    return [*(part.detach() for part in parts), *gradients]


def relative_errors(measured, reference):
    return [
        ((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
        for ours, theirs in zip(measured, reference, strict=True)
    ]


def assert_equal_to_dense(head, x, kernel):
    expected = losses_and_gradients(head, x, "dense")
    for ours, theirs in zip(losses_and_gradients(head, x, kernel), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
