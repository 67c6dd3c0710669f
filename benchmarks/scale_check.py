"""The model on paper of `benchmarks.scale` beside what was measured.

    python -m benchmarks.scale_check        # prints the check tables of benchmarks/scale.md

Notable:
- times are those of `benchmarks.step` at its late stage; FLOPs are those of the measured shape,
  with the L0 that each site had
- what is compared is what heads add to a plain step: its own 1 would hide how far they are off
- memory is that of `benchmarks.full_size`, the whole program's
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.scale import LANGUAGES, Step, heads_of
from benchmarks.shapes import SHAPES
from hf_saereg import flops

RESULTS = Path(__file__).parent / "results"
TIMES = (
    "gpt2_small",
    "gpt2_small_32x",
    "published",
    "published_late_again",
    "published_avx2",
    "uniform512",
    "uniform4096",
    "uniform8192",
)
FULL_SIZE = Step(LANGUAGES[0], heads_of(LANGUAGES[0]), gpus=1, micro=1024, reference=True)
GIB = 2**30
# no measured point is further off, by this factor, than the page says
DENSE_WITHIN, SPARSE_WITHIN, MEMORY_WITHIN = 1.4, 4.0, 1.3


def read(name: str) -> dict[str, Any]:
    """One file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def ratio_on_paper(results: dict[str, Any], sparse: bool) -> float:
    """FLOPs of a step with heads over those of a plain one.

    Args:
        results: as `benchmarks.step` writes them.
        sparse: each head computes its active latents alone past the encoder.
    """
    shape = SHAPES[results["shape"]]
    context = min(shape.context, results["tokens"])  # of the measured sequences
    plain = flops.gpt2_flops(shape.model_config().to_dict() | {"n_positions": context})
    sites = results["stages"]["late"]["sites"].values()
    heads = [
        flops.head_flops(shape.d_in, site["d_sae"], site["l0"] if sparse else None)
        for site in sites
    ]
    return 1 + sum(heads) / plain


def measured_ratio(results: dict[str, Any], sparse: bool) -> float:
    """Seconds of a step with heads over those of a plain one.

    Args:
        results: as `benchmarks.step` writes them.
        sparse: of the sparse kernel, else of the dense one.
    """
    path = "sparse" if sparse else "dense"
    return results["stages"]["late"]["paths"][path]["ratio_to_plain"]


def off_by(results: dict[str, Any], sparse: bool) -> float:
    """What heads were measured to add to a plain step, over what they add on paper."""
    return (measured_ratio(results, sparse) - 1) / (ratio_on_paper(results, sparse) - 1)


def time_table() -> list[str]:
    """Time and FLOPs over a plain step's, by file of results."""
    lines = [
        "| results | tokens | precision | dense, FLOPs | time | added, time ÷ FLOPs | "
        "sparse, FLOPs | time | added, time ÷ FLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in TIMES:
        results = read(name)
        cells = [name, f"{results['tokens']:,}", results["precision"]]
        for sparse in (False, True):
            cells.append(f"× {ratio_on_paper(results, sparse):.2f}")
            cells.append(f"× {measured_ratio(results, sparse):.2f}")
            cells.append(f"{off_by(results, sparse):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table() -> list[str]:
    """Computed memory by what it is for, and the measured peak, GiB."""
    computed = FULL_SIZE.memory()
    names = [*computed, "sum", "measured peak", "measured ÷ sum"]
    total, measured = sum(computed.values()) / GIB, read("full_size")["peak_gib"]
    values = [f"{size / GIB:.2f}" for size in computed.values()]
    values += [f"{total:.2f}", f"{measured:.2f}", f"{measured / total:.2f}"]
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), values)]


if __name__ == "__main__":
    print("\n".join([*time_table(), "", *memory_table()]))
