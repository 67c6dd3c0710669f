"""Every kernel returns the dense definition's values and gradients."""

import copy
import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path

import against_dense
import numpy as np
import pytest
import torch
from against_dense import head_and_tokens, losses_and_gradients, relative_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from hf_saereg import kernels
from hf_saereg.errors import UserError
from hf_saereg.heads import FAMILIES
from hf_saereg.heads.folder import load_head, save_heads
from hf_saereg.kernels import Above, LargestK, chunks, dense, sparse, team

ARCHITECTURES = tuple(FAMILIES)


def assert_equal_to_dense(head, x):
    against_dense.assert_equal_to_dense(head, x, "sparse")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 70),
    d_in=st.integers(1, 20),
    d_sae=st.integers(1, 150),
    data=st.data(),
    seed=st.integers(0, 10**6),
)
def test_float64_losses_and_gradients_are_the_dense_ones(
    architecture, tokens, d_in, d_sae, data, seed
):
    k = data.draw(st.integers(1, d_sae))
    assert_equal_to_dense(*head_and_tokens(architecture, tokens, d_in, d_sae, k, seed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_chunks(architecture, monkeypatch):
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 1000)
    assert_equal_to_dense(*head_and_tokens(architecture, 101, 6, 67, k=5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "bfloat16"])
def test_the_dense_definition_is_the_same_in_chunks(architecture, autocast, monkeypatch):
    dtype = torch.float32 if autocast else torch.float64
    head, x = head_and_tokens(architecture, 101, 6, 67, k=5, dtype=dtype)
    whole = losses_and_gradients(head, x, "dense", autocast)
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 1000)
    chunked = losses_and_gradients(head, x, "dense", autocast)
    # gradients of the weights are rounded to bfloat16 chunk by chunk
    errors = relative_errors(chunked, [part.double() for part in whole])
    assert max(errors) < (1e-2 if autocast else 1e-13)


@pytest.mark.parametrize(
    ("architecture", "kernel", "options"),
    [
        *((name, kernel, {}) for name in ARCHITECTURES for kernel in ("dense", "sparse")),
        ("topk", "dense", {"auxk": 400, "dead_after_tokens": 1}),  # all are dead
    ],
)
def test_no_array_of_tokens_times_latents_is_ever_alive(architecture, kernel, options, monkeypatch):
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 2**15)
    head, x = head_and_tokens(architecture, 2000, 8, 512, k=10, dtype=torch.float32, **options)
    with torch.no_grad():
        head.tokens_since_fired += 1
        head.encoder_bias.sub_(5 if kernel == "sparse" else 0)
    with profile(profile_memory=True) as profiler:
        losses_and_gradients(head, x, kernel)
    alive, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert x.numel() * x.element_size() < peak < len(x) * 512 * x.element_size() / 2


@pytest.mark.parametrize("b_enc", [-1e6, 1e6], ids=["no latent active", "all active"])
def test_extreme_densities(b_enc):
    head, x = head_and_tokens("standard", 33, 5, 19)
    with torch.no_grad():
        head.b_enc.fill_(b_enc)
    expected = losses_and_gradients(head, x, "dense")
    errors = relative_errors(losses_and_gradients(head, x, "sparse"), expected)
    assert max(errors) < 1e-12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_layout_of_x_does_not_matter(architecture):
    head, x = head_and_tokens(architecture, 40, 8, 30, k=4)
    assert_equal_to_dense(head, x.T.contiguous().T)
    assert_equal_to_dense(head, x[::3])
    assert_equal_to_dense(head, x[:1].expand(7, -1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_lower_precision_is_no_less_exact_than_dense(architecture, autocast):
    # sums that go from token to token round a little more than those of BLAS
    slack, bound = (1e-3, 0.1) if autocast else (3e-6, 5e-6)
    dense_errors, errors = [], []
    for seed in range(4):
        head, x = head_and_tokens(architecture, 1000, 64, 512, k=20, seed=seed)
        with torch.no_grad():
            head.encoder_bias.sub_(3)
        reference = losses_and_gradients(head, x, "dense")
        head, x = head.float(), x.float()
        for kernel, its_errors in (("dense", dense_errors), ("sparse", errors)):
            measured = losses_and_gradients(head, x, kernel, autocast)
            its_errors.append(relative_errors(measured, reference))
    # medians over seeds: which latent crosses a threshold by rounding is luck
    dense_errors, errors = (torch.tensor(all_).median(0).values for all_ in (dense_errors, errors))
    assert (errors <= 1.2 * dense_errors + slack).all()
    assert max(errors) < bound


@pytest.mark.parametrize("selection", [Above(0.1), LargestK(3)])
def test_gradcheck(selection):
    torch.manual_seed(0)
    x, W_enc, W_dec, b_enc, b_dec = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(5, 4), (4, 7), (7, 4), (7,), (4,)]
    )

    def reconstruction(x, W_enc, b_enc, W_dec, b_dec):
        codes = sparse.encode(x, W_enc, b_enc, selection)
        return sparse.decode(codes.pre.square(), codes, W_dec, b_dec)

    assert torch.autograd.gradcheck(reconstruction, (x, W_enc, b_enc, W_dec, b_dec))


def test_per_latent_thresholds():
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(50, 6), torch.randn(6, 41), torch.randn(41)
    thresholds = torch.randn(41, requires_grad=True)
    pre = dense.encode(x, W_enc, b_enc, Above(thresholds)).pre
    codes = sparse.encode(x, W_enc, b_enc, Above(thresholds))
    selected = pre > thresholds
    torch.testing.assert_close(codes.pre, pre[selected])
    torch.testing.assert_close(codes.latents.long(), selected.nonzero()[:, 1])
    torch.testing.assert_close(codes.offsets[1:], selected.sum(1).cumsum(0))
    torch.testing.assert_close(codes.counts(codes.pre > 0.5, 41), (selected & (pre > 0.5)).sum(0))


@pytest.mark.parametrize("k", [1, 3, 40, 100])
@pytest.mark.parametrize("values", [torch.tensor([0.0]), torch.tensor([-1.0, 0.0, 2.0])])
def test_ties_select_exactly_k_of_the_largest(k, values):
    torch.manual_seed(0)
    pre = values[torch.randint(len(values), (30, 100))]
    codes = sparse.encode(pre, torch.eye(100), torch.zeros(100), LargestK(k))
    assert codes.offsets.diff().eq(k).all()
    assert len(set(zip(torch.arange(30).repeat_interleave(k).tolist(), codes.latents.tolist(),
                       strict=True))) == 30 * k  # fmt: skip
    largest = pre.topk(k).values.sort().values
    torch.testing.assert_close(codes.pre.view(30, k).sort().values, largest)


@pytest.mark.parametrize("selection", [Above(0.0), LargestK(2)])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_what_is_not_finite_is_selected(selection, bad):
    b_enc = torch.full((20,), -1.0)
    b_enc[7] = bad
    codes = sparse.encode(torch.zeros(3, 2), torch.zeros(2, 20), b_enc, selection)
    assert (codes.latents == 7).sum() == 3
    assert not codes.pre[codes.latents == 7].isfinite().any()


def test_the_same_from_run_to_run_and_close_for_any_number_of_threads():
    head, x = head_and_tokens("standard", 3000, 16, 100, dtype=torch.float32)
    threads = torch.get_num_threads()
    first = losses_and_gradients(head, x, "sparse")
    for _ in range(3):
        again = losses_and_gradients(head, x, "sparse")
        assert all(map(torch.equal, first, again))
    try:
        torch.set_num_threads(3)
        codes = sparse.encode(x, head.W_enc, head.b_enc, Above(0.0))
        grad_3 = torch.autograd.grad(codes.pre.sum(), head.W_enc)[0]
        torch.set_num_threads(1)
        grad_1 = torch.autograd.grad(
            sparse.encode(x, head.W_enc, head.b_enc, Above(0.0)).pre.sum(), head.W_enc
        )[0]
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(grad_1, grad_3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("selection", [Above(0.1), LargestK(3)])
def test_loops_find_the_same_on_torchs_threads_and_on_pythons(monkeypatch, dtype, selection):
    """Every loop, forward and backward, with as many parts as threads."""

    def found():
        generator = torch.Generator().manual_seed(0)
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        x, W_enc, W_dec = (
            torch.randn(shape, generator=generator, dtype=wide).requires_grad_()
            for shape in ((701, 6), (6, 50), (50, 6))
        )
        b_enc, b_dec = torch.zeros(50, dtype=wide), torch.zeros(6, dtype=wide)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            codes = sparse.encode(x, W_enc, b_enc.requires_grad_(), selection)
        x_hat = sparse.decode(codes.pre, codes, W_dec, b_dec)
        gradients = torch.autograd.grad(x_hat.square().sum(), (x, W_enc, b_enc, W_dec))
        return [codes.pre, codes.latents, codes.offsets, x_hat, *gradients]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ours = found()
        monkeypatch.setattr(team, "_gomp_parallel", lambda: None)
        theirs = found()
        torch.set_num_threads(1)
        alone = found()
    finally:
        torch.set_num_threads(threads)
    for mine, other, single in zip(ours, theirs, alone, strict=True):
        assert torch.equal(mine, other) and torch.equal(mine, single)


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU OpenMP on Linux alone")
def test_torchs_threads_are_found():
    assert Path(team._library()).is_file() and team._gomp_parallel() is not None


def test_an_array_that_a_loop_could_not_read_is_refused():
    with pytest.raises(ValueError, match="not contiguous"):
        team._words(np.zeros((4, 4))[:, :2])


def _fork_target(queue):
    torch.set_num_threads(2)
    codes = sparse.encode(torch.ones(9, 2), torch.ones(2, 5), torch.zeros(5), LargestK(2))
    queue.put(codes.pre.tolist())


def test_works_in_a_forked_process():
    # as in the workers of a DataLoader: the parent's threads do not exist there
    sparse.encode(torch.ones(9, 2), torch.ones(2, 5), torch.zeros(5), LargestK(2))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_fork_target, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == [2.0] * 18
    process.join(timeout=60)
    assert process.exitcode == 0


def test_importing_the_kernels_imports_neither_numba_nor_triton():
    code = "import sys, hf_saereg.kernels; sys.exit(bool({'numba', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("kernel", "density", "dtype", "picked"),
    [
        ("auto", 0.01, torch.float32, sparse),
        ("auto", 0.01, torch.float64, sparse),
        ("auto", 1.0, torch.float32, dense),
        ("auto", 0.01, torch.bfloat16, dense),
        ("dense", 0.01, torch.float32, dense),
        ("sparse", 1.0, torch.float32, sparse),
    ],
)
def test_pick(kernel, density, dtype, picked):
    for was_sparse in (False, True):
        assert kernels.pick(kernel, density, torch.zeros(1, 1, dtype=dtype), was_sparse) is picked


@pytest.mark.parametrize(("d_in", "near"), [(64, 0.2), (768, 0.08)])
def test_near_the_crossover_the_kernel_stays_what_it_was(d_in, near):
    W_enc = torch.empty(d_in, 4096)
    for density in (0.9 * near, near, 1.1 * near):
        assert kernels.pick("auto", density, W_enc, was_sparse=False) is dense
        assert kernels.pick("auto", density, W_enc, was_sparse=True) is sparse
    for was_sparse in (False, True):
        assert kernels.pick("auto", 0.7 * near, W_enc, was_sparse) is sparse
        assert kernels.pick("auto", 1.4 * near, W_enc, was_sparse) is dense


def at_density(density, tokens=2000):
    """A standard head of 100 latents, of which so many are active on every token; and tokens."""
    head, x = head_and_tokens("standard", tokens, 8, 100, dtype=torch.float32)
    with torch.no_grad():
        head.b_enc.copy_(torch.where(torch.arange(100) < 100 * density, 50.0, -50.0))
    return head, x


def test_a_change_of_kernel_is_logged_once_with_site_and_density(caplog):
    caplog.set_level(logging.INFO, logger="hf_saereg")
    head, x = at_density(0.05)
    head.losses(x)
    head.losses(x)
    with torch.no_grad():
        head.b_enc.fill_(50.0)
    head.losses(x)
    assert caplog.messages == [
        "a site: density 0.050, kernel dense → sparse",
        "a site: density 1.000, kernel sparse → dense",
    ]


def test_a_reloaded_head_goes_on_with_the_kernel_it_had(tmp_path):
    (wide, x), (narrow, _), (between, _) = at_density(0.6), at_density(0.1), at_density(0.2)
    bits = {}
    for before, first in (("dense", wide), ("sparse", narrow)):
        head = copy.deepcopy(first)
        head.config.hook_name = "blocks.0.hook_resid_pre"
        head.losses(x)  # settles on a kernel
        with torch.no_grad():
            head.b_enc.copy_(between.b_enc)  # and is trained to a density in between
        save_heads([head], tmp_path)
        reloaded = load_head(tmp_path, head.config.hook_name)
        assert "was_sparse" not in head.saelens_weights()
        uninterrupted, resumed = (losses_and_gradients(h, x, "auto") for h in (head, reloaded))
        forced = losses_and_gradients(head, x, before)
        assert all(map(torch.equal, uninterrupted, resumed))
        assert all(map(torch.equal, uninterrupted, forced))
        bits[before] = forced
    assert not all(map(torch.equal, bits["dense"], bits["sparse"]))  # it does matter


def test_evaluation_changes_no_mind():
    head, x = at_density(0.05)
    head.eval()
    head.losses(x)
    assert not head.was_sparse
    assert kernels.pick("auto", 0.05, head.W_enc) is sparse


def test_pick_is_dense_on_other_devices():
    assert kernels.pick("auto", 0.0, torch.zeros(1, 1, device="meta")) is dense


def test_pick_names_the_kernels_when_there_is_no_such_one():
    with pytest.raises(UserError, match="'fast'; choose one of auto, dense, sparse, triton"):
        kernels.pick("fast", 0.5, torch.zeros(1, 1))
