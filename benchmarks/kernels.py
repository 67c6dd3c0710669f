"""Speed of one head's step, dense against sparse: python -m benchmarks.kernels.

Notable:
- heads are synthetic: random weights and tokens, `b_enc` shifted until the mean L0 is the one
  asked for; a TopK head gets k = L0
- what is timed is forward and backward, with the gradient of x, as in training; the encoder
  product alone, the one dense product that no exact kernel can avoid, is the floor
- contestants take turns, and the median is reported: a shared machine is noisy
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from hf_saereg.heads import SAEHead, SAEHeadConfig, make_head


def synthetic_head(architecture: str, d_in: int, d_sae: int, l0: float) -> SAEHead:
    """A head whose mean L0 on standard normal tokens is `l0`."""
    config = SAEHeadConfig(architecture, "synthetic", d_in, d_sae, 0.1, k=round(l0))
    head = make_head(config)
    with torch.no_grad():
        if architecture != "topk":
            pre = torch.randn(2048, d_in) @ head.W_enc  # (tokens, d_sae)
            head.b_enc -= pre.flatten().kthvalue(round(pre.numel() * (1 - l0 / d_sae))).values
    return head


def step(head: SAEHead, x: torch.Tensor, kernel: str, autocast: bool) -> None:
    """One forward and backward pass, from scratch."""
    head.kernel = kernel
    head.zero_grad()
    x.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = head.losses(x)
        term = losses.reconstruction + losses.sparsity
    term.backward()


def product(head: SAEHead, x: torch.Tensor, autocast: bool) -> None:
    """The encoder product alone, in chunks that fit the cache."""
    dtype = torch.bfloat16 if autocast else x.dtype
    with torch.no_grad():
        W = head.W_enc.to(dtype)
        for rows in x.to(dtype).split(2**21 // head.config.d_sae):
            rows @ W


def interleaved_medians(contestants: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median milliseconds of each, taking turns after one warm-up round."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds + 1):
        for contestant, its_times in zip(contestants, times, strict=True):
            start = time.perf_counter()
            contestant()
            if turn:
                its_times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(its_times) for its_times in times]


def main() -> None:
    """Print one line a head and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--d_in", type=int, default=64)
    parser.add_argument("--d_sae", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--l0", type=float, nargs="+", default=[20.0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    print(
        f"{options.tokens} tokens, d_in {options.d_in}, {torch.get_num_threads()} threads, "
        f"synthetic heads, forward and backward, medians of {options.rounds}, ms"
    )
    print(f"{'head':<10}{'d_sae':>7}{'L0':>7}{'autocast':>10}", end="")
    print(f"{'dense':>9}{'sparse':>9}{'ratio':>7}{'product':>9}")
    for architecture in ("standard", "topk"):
        for d_sae in options.d_sae:
            for l0 in options.l0:
                head = synthetic_head(architecture, options.d_in, d_sae, l0)
                x = torch.randn(options.tokens, options.d_in, requires_grad=True)
                active = head.losses(x).statistics.l0
                for autocast in (False, True):
                    dense, sparse, alone = interleaved_medians(
                        [
                            lambda a=autocast, h=head, x=x: step(h, x, "dense", a),
                            lambda a=autocast, h=head, x=x: step(h, x, "sparse", a),
                            lambda a=autocast, h=head, x=x: product(h, x, a),
                        ],
                        options.rounds,
                    )
                    precision = "bfloat16" if autocast else "off"
                    print(f"{architecture:<10}{d_sae:>7}{active:>7.1f}{precision:>10}", end="")
                    print(f"{dense:>9.1f}{sparse:>9.1f}{dense / sparse:>7.1f}{alone:>9.1f}")


if __name__ == "__main__":
    main()
