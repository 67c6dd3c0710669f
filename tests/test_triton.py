"""The Triton kernel returns the dense definition's values and gradients.

On a GPU where there is one, otherwise in Triton's interpreter, which runs one program after the
other at about a millisecond each: hence the small shapes, and blocks that are small too, so that
every loop takes several turns.
"""

import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from against_dense import (
    assert_equal_to_dense,
    head_and_tokens,
    losses_and_gradients,
    relative_errors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from hf_saereg import kernels
from hf_saereg.errors import UserError
from hf_saereg.heads import FAMILIES
from hf_saereg.kernels import Above, LargestK, chunks, dense
from hf_saereg.trainer import SAERegArguments

pytest.importorskip("triton", reason="triton is not installed; pip install 'hf-saereg[triton]'")

from hf_saereg.kernels import triton as kernel
from hf_saereg.kernels import triton_sums

ARCHITECTURES = tuple(FAMILIES)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def small_blocks():
    sizes = {"RUN": 3, "ENTRIES": 4, "COLUMNS": 4}
    with patch.multiple(triton_sums, **sizes), patch.object(kernel, "LATENTS", 4):
        yield


def small_case(architecture, tokens, d_in, d_sae, k=1, **options):
    return head_and_tokens(architecture, tokens, d_in, d_sae, k, device=DEVICE, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=5, deadline=None)
@given(
    tokens=st.integers(0, 8),
    d_in=st.integers(1, 6),
    d_sae=st.integers(1, 11),
    data=st.data(),
    seed=st.integers(0, 10**6),
)
def test_float64_losses_and_gradients_are_the_dense_ones(
    architecture, tokens, d_in, d_sae, data, seed
):
    k = data.draw(st.integers(1, d_sae))
    with small_blocks():
        head, x = small_case(architecture, tokens, d_in, d_sae, k, seed=seed)
        assert_equal_to_dense(head, x, "triton")


@pytest.mark.parametrize(
    "architecture, options",
    [
        *((architecture, {}) for architecture in ARCHITECTURES),
        ("standard", {"tied": True}),
        ("gated", {"tied": True, "normalization": "layer_norm"}),
        ("jumprelu", {"bandwidth": 1.0}),
        ("jumprelu", {"reference_window": True, "normalization": "variance"}),
        ("jumprelu", {"quadratic_penalty": True, "target_l0": 3}),
        ("topk", {"rectified": False}),
        ("topk", {"auxk": 2}),
        ("batchtopk", {"auxk": 2}),
    ],
    ids=str,
)
def test_every_family_and_option_in_blocks_of_the_usual_size(architecture, options):
    head, x = small_case(architecture, 8, 5, 11, k=3, **options)
    head.tokens_since_fired[::3] = 10**9  # a third of the latents is dead
    assert_equal_to_dense(head, x, "triton")


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_several_chunks(architecture, monkeypatch):
    for name in ("CPU_ELEMENTS", "ACCELERATOR_ELEMENTS"):
        monkeypatch.setattr(chunks, name, 60)
    head, x = small_case(architecture, 7, 3, 13, k=4)
    assert chunks.chunk_size(x, 13) == 4
    assert_equal_to_dense(head, x, "triton")


@pytest.mark.parametrize("b_enc", [-1e6, 1e6], ids=["no latent active", "all active"])
def test_extreme_densities(b_enc):
    head, x = small_case("standard", 7, 5, 5)
    with torch.no_grad():
        head.b_enc.fill_(b_enc)
    expected = losses_and_gradients(head, x, "dense")
    with small_blocks():
        errors = relative_errors(losses_and_gradients(head, x, "triton"), expected)
    assert max(errors) < 1e-12


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_memory_layout_of_x_does_not_matter(architecture):
    head, x = small_case(architecture, 9, 4, 10, k=2)
    assert_equal_to_dense(head, x.T.contiguous().T, "triton")
    assert_equal_to_dense(head, x[::3], "triton")
    assert_equal_to_dense(head, x[:1].expand(5, -1), "triton")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_lower_precision_is_no_less_exact_than_dense(architecture, precision):
    # which latent crosses a threshold by rounding is luck: means over seeds, and some slack
    slack, bound = (2e-7, 1e-5) if precision == "float32" else (1e-2, 0.2)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    dense_errors, errors = [], []
    for seed in range(2):
        head, x = small_case(architecture, 12, 8, 12, k=3, seed=seed)
        with torch.no_grad():
            head.encoder_bias.sub_(2)
            for tensor in (x, *head.parameters()):
                tensor.copy_(tensor.bfloat16())  # rounded for all alike
        reference = losses_and_gradients(head, x, "dense")
        head, x = head.to(dtype), x.to(dtype)
        for name, its_errors in (("dense", dense_errors), ("triton", errors)):
            measured = losses_and_gradients(head, x, name, precision == "autocast")
            its_errors.append(relative_errors(measured, reference))
    dense_errors, errors = torch.tensor(dense_errors).mean(0), torch.tensor(errors).mean(0)
    assert (errors <= 1.2 * dense_errors + slack).all()
    assert max(errors) < bound


@pytest.mark.parametrize("selection", [Above(0.1), LargestK(2)])
def test_gradcheck(selection):
    torch.manual_seed(0)
    x, W_enc, W_dec, b_enc, b_dec = (
        torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for shape in [(3, 2), (2, 4), (4, 2), (4,), (2,)]
    )

    def reconstruction(x, W_enc, b_enc, W_dec, b_dec):
        codes = kernel.encode(x, W_enc, b_enc, selection)
        return kernel.decode(codes.pre.square() * codes.at(b_enc), codes, W_dec, b_dec)

    assert torch.autograd.gradcheck(reconstruction, (x, W_enc, b_enc, W_dec, b_dec), fast_mode=True)


def test_per_latent_thresholds():
    torch.manual_seed(0)
    x, W_enc, b_enc = (torch.randn(*s, device=DEVICE) for s in [(8, 6), (6, 41), (41,)])
    thresholds = torch.randn(41, device=DEVICE, requires_grad=True)
    pre = dense.encode(x, W_enc, b_enc, Above(thresholds)).pre
    with small_blocks():
        codes = kernel.encode(x, W_enc, b_enc, Above(thresholds))
    selected = pre > thresholds
    assert torch.equal(codes.pre, pre[selected])
    assert torch.equal(codes.latents.long(), selected.nonzero()[:, 1])
    assert torch.equal(codes.offsets[1:], selected.sum(1).cumsum(0))
    assert torch.equal(codes.counts(codes.pre > 0.5, 41), (selected & (pre > 0.5)).sum(0))


def test_ties_select_what_the_dense_definition_selects():
    torch.manual_seed(0)
    pre = torch.tensor([-1.0, 0.0, 2.0])[torch.randint(3, (6, 30))].to(DEVICE)
    eye, zeros = torch.eye(30, device=DEVICE), torch.zeros(30, device=DEVICE)
    codes = kernel.encode(pre, eye, zeros, LargestK(12))
    tokens = torch.arange(6).repeat_interleave(12)
    found = torch.zeros(6, 30).index_put((tokens, codes.latents.long().cpu()), codes.pre.cpu())
    assert torch.equal(found, dense.encode(pre, eye, zeros, LargestK(12)).pre.cpu())
    assert codes.offsets.diff().eq(12).all()


@pytest.mark.parametrize("selection", [Above(0.0), LargestK(2)])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_what_is_not_finite_is_selected(selection, bad):
    b_enc = torch.full((20,), -1.0, device=DEVICE)
    b_enc[7] = bad
    zeros = torch.zeros(3, 2, device=DEVICE), torch.zeros(2, 20, device=DEVICE)
    codes = kernel.encode(*zeros, b_enc, selection)
    assert (codes.latents == 7).sum() == 3
    assert not codes.pre[codes.latents == 7].isfinite().any()


def test_no_array_of_tokens_times_latents_is_ever_alive(monkeypatch):
    for name in ("CPU_ELEMENTS", "ACCELERATOR_ELEMENTS"):
        monkeypatch.setattr(chunks, name, 2**10)
    head, x = small_case("standard", 64, 4, 256)
    with torch.no_grad():
        head.b_enc.sub_(7)  # a few percent are left
    with profile(profile_memory=True) as profiler:
        losses_and_gradients(head, x, "triton")
    alive, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and (event.device_type().name == "CUDA") == (
            DEVICE == "cuda"
        ):
            alive += event.nbytes()
            peak = max(peak, alive)
    assert x.numel() * x.element_size() < peak < len(x) * 256 * x.element_size()


def test_the_term_of_a_model_is_the_dense_one(model, input_ids):
    model, input_ids = model.double().to(DEVICE), input_ids[:2, :4].to(DEVICE)
    results = []
    for name in ("dense", "triton"):
        for head in model.heads:
            head.kernel = name
        model.zero_grad()
        term = model(input_ids, labels=input_ids).term
        term.backward()
        results.append([term.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


COMPILED = """
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import float32, float64
from hf_saereg.kernels import triton_loops as loops

def parameters(SUM, product, x):
    counted = dict(product=product, bias=x, thresholds=x, d_sae="i32", SUM=SUM, LATENTS=1024)
    sizes = dict(width="i32", out=x, SUM=SUM, ENTRIES=16, COLUMNS=128)
    summed = dict(weights=x, indices="*i32", bounds="*i64", rows=x, **sizes)
    yield loops.count_above, dict(counts="*i32", **counted)
    yield loops.fill_above, dict(starts="*i64", pre=x, latents="*i32", **counted)
    yield loops.sum_rows, dict(first_term=x, **summed)
    yield loops.sum_rows, dict(first_term=None, **summed)
    rows = dict(token_rows=x, latents="*i32", offsets="*i64", latent_rows=x)
    yield loops.dot_rows, dict(**rows, **sizes)

atomics = {}
for how in ((float32, "*bf16", "*fp32"), (float64, "*fp64", "*fp64"), (float32, "*bf16", "*bf16")):
    for loop, types in parameters(*how):
        fixed = {k: types[k] for k in types if not isinstance(types[k], str)}
        signature = {k: "constexpr" if k in fixed else types[k] for k in loop.arg_names}
        source = ASTSource(loop, signature, fixed)
        binary = compile(source, target=GPUTarget("cuda", 90, 32)).asm
        assert len(binary["cubin"]) > 0
        words = binary["ptx"].split()
        name = f"{loop.__name__} {how[1:]} {len(fixed)}"
        atomics[name] = [w for w in words if w.startswith(("atom.", "red."))]
print(json.dumps(atomics))
"""


def test_the_loops_compile_for_a_gpu_and_hold_no_atomics(tmp_path):
    # the interpreter takes what no GPU would; the compiler needs no GPU
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    atomics = json.loads(done.stdout)
    assert len(atomics) == 15 and not any(atomics.values())


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has one order; needs a GPU")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_from_run_to_run(architecture):
    head, x = small_case(architecture, 3000, 16, 100, k=10, dtype=torch.float32)
    first = losses_and_gradients(head, x, "triton")
    for _ in range(3):
        assert all(map(torch.equal, first, losses_and_gradients(head, x, "triton")))


# ---- choice ----


def weight_on_a_gpu(d_in, d_sae, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(d_in, d_sae, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_auto_on_a_gpu_is_triton_where_few_latents_are_active(dtype):
    W_enc = weight_on_a_gpu(768, 6144, dtype)
    assert kernels.pick("auto", 15 / 6144, W_enc) is kernel
    assert kernels.pick("auto", 0.05, W_enc) is dense
    assert kernels.pick("auto", 0.005, W_enc, was_sparse=False) is dense
    assert kernels.pick("auto", 0.005, W_enc, was_sparse=True) is kernel


def test_auto_on_a_gpu_is_dense_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "_triton_installed", lambda: False)
    assert kernels.pick("auto", 0.0, weight_on_a_gpu(768, 6144)) is dense


def test_a_head_changes_to_triton_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "fast_kernel", lambda W_enc: "triton")
    monkeypatch.setattr(kernels, "_crossover", lambda W_enc: 0.2)
    caplog.set_level(logging.INFO, logger="hf_saereg")
    head, x = small_case("topk", 8, 5, 10, k=1)
    expected = losses_and_gradients(head, x, "dense")
    for ours, theirs in zip(losses_and_gradients(head, x, "auto"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert caplog.messages == ["a site: density 0.100, kernel dense → triton"]
    assert head.was_sparse


def test_without_a_gpu_triton_is_refused_before_training(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"^The kernel 'triton' needs a GPU, .* on cpu; choose"):
        SAERegArguments(output_dir=str(tmp_path), use_cpu=True, kernel="triton")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        kernels.pick("triton", 0.0, torch.zeros(1, 1))


def test_without_triton_it_is_refused_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_triton_installed", lambda: False)
    with pytest.raises(UserError, match=r"^The kernel 'triton' needs the package triton, .*pip"):
        SAERegArguments(output_dir=str(tmp_path), use_cpu=True, kernel="triton")


def test_the_kernel_of_the_cpu_is_refused_on_a_gpu():
    with pytest.raises(
        UserError, match=r"^The kernel 'sparse' runs on a CPU, .* on cuda:0; choose"
    ):
        kernels.pick("sparse", 0.0, weight_on_a_gpu(4, 8))
