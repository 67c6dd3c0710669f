"""What a step of the fresh heads of one cell costs: stacked, and one by one.

    python -m benchmarks.fresh --json benchmarks/results/fresh.json

Notable:
- heads on five sites of unit normal activations, after `WARM_UP` steps on them: steered families
  are still far from their target then, a third or half of their latents active, as early in a sweep
- both ways take turns, and medians are compared; a sweep takes the second where the arrays of a
  stack would be larger than heads/stack.py allows
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import conditions, median_seconds
from hf_saereg.errors import UserError, one_sentence_errors
from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.stack import HeadStack
from hf_saereg.run_folder import write_json
from hf_saereg.sweep import Track

SITES, D_IN = 5, 64
SIZES = ((128, 512), (512, 512), (512, 2048))  # d_sae, tokens
FAMILIES = {
    "topk, k 10": ("topk", {"k": 10}),
    "topk, a third active": ("topk", {"k": None}),
    "standard": ("standard", {"sparsity_coefficient": 0.3, "target_l0": 10.0}),
    "jumprelu": ("jumprelu", {"sparsity_coefficient": 0.05, "target_l0": 10.0}),
}
WARM_UP = 30
LEARNING_RATE = 1e-3


def step_of(family: str, d_sae: int, tokens: int, is_stacked: bool) -> Callable[[], None]:
    """A function that takes one step.

    Args:
        family: one of `FAMILIES`.
        d_sae: latents of each head.
        tokens: of each head.
        is_stacked: whether the heads are one wide head.
    """
    architecture, options = FAMILIES[family]
    if options.get("k", 0) is None:
        options = {"k": d_sae // 3}
    torch.manual_seed(0)
    bank = HeadBank(
        make_head(SAEHeadConfig(architecture, f"blocks.{i}.hook_resid_pre", D_IN, d_sae, **options))
        for i in range(SITES)
    )
    stack = HeadStack.of(bank) if is_stacked else None
    parameters = (stack.wide if stack else bank).parameters()
    track = Track(bank, stack, torch.optim.Adam(parameters, fused=True), WARM_UP, tokens)
    activations = {name: torch.randn(tokens, D_IN) for name in bank.hook_names}
    for _ in range(WARM_UP):
        track.train(activations, LEARNING_RATE)
    return lambda: track.train(activations, 0.0)


def measure(repeats: int) -> list[dict[str, object]]:
    """Seconds of a step by family, size and way.

    Args:
        repeats: turns of which the median is taken.
    """
    rows = []
    for d_sae, tokens in SIZES:
        for family in FAMILIES:
            ways = {"stacked": True, "one by one": False}
            steps = {way: step_of(family, d_sae, tokens, own) for way, own in ways.items()}
            seconds = median_seconds(steps, repeats)
            ratio = seconds["one by one"] / seconds["stacked"]
            rows.append(
                {"family": family, "d_sae": d_sae, "tokens": tokens, "seconds": seconds}
                | {"speedup": ratio}
            )
            print(
                f"d_sae {d_sae}, {tokens} tokens, {family}: stacked {1e3 * seconds['stacked']:.1f} "
                f"ms, one by one {1e3 * seconds['one by one']:.1f} ms, {ratio:.2f} times as fast"
            )
    return rows


def main() -> None:
    """Measure, print, write JSON.

    Raises:
        UserError: if there are no repeats.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}; a median needs at least one repeat.")
    results = {
        **conditions(),
        "repeats": options.repeats,
        "rows": measure(options.repeats),
    }
    write_json(options.json, results)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
