"""What a training step costs, by the path that computes the term.

    python -m benchmarks.step --shape published --json published.json

writes published.png too: cost against d_sae and against L0; `--figure none` saves that time.

Paths: the plain step; the floor, which is the plain step and the encoders' forward products; the
naive way, whole arrays and autograd; on a GPU the same compiled; and every kernel of ours that runs
here.

Notable:
- heads and activations come from a short real run, see `benchmarks.training`: made on first use, in
  `runs/benchmarks/SHAPE` or the folder that `--checkpoints` names
- paths take turns in one process, each twice a turn, and medians of the second times are compared:
  a shared machine is noisy, and a path slows the next one
- precision is the one that our default path is fastest with: float32, bfloat16 autocast of all, or
  of the heads alone (`term_bf16`); the plain step of that row then has float32. It is chosen on a
  sixteenth of the tokens, `--precision` leaves that out
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_memory
from benchmarks.paths import PRECISIONS, load, steps_by_path
from benchmarks.scaling import measure_scaling
from benchmarks.shapes import SHAPES, Shape
from benchmarks.story import STEPS, measure_story
from benchmarks.table import text
from benchmarks.timing import conditions, median_seconds
from benchmarks.training import STAGES, checkpoints, how_made
from hf_saereg.errors import UserError, one_sentence_errors
from hf_saereg.report.layout import require_extra
from hf_saereg.run_folder import write_json

DOUBLING_TURNS = 20
# Of the tokens, to choose a precision by: where a CPU has no instructions for bfloat16, one encoder
# product in it took 50 times as long as in float32.
PRECISION_PART = 1 / 16


def precision_seconds(checkpoint: Path, input_ids: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of our default path in each precision, on a part of the tokens.

    Args:
        checkpoint: the late one.
        input_ids: (sequences, sequence), of a whole step.
        repeats: of each.
    """
    model = load(checkpoint)
    some = max(1, round(PRECISION_PART * len(input_ids)))
    input_ids = input_ids[:some].to(model.device)
    steps = {p: steps_by_path(model, input_ids, p)["auto"] for p in PRECISIONS}
    return median_seconds(steps, repeats)


def measure_stage(
    checkpoint: Path, name: str, shape: Shape, tokens: int, precision: str, repeats: int
) -> dict[str, Any]:
    """All paths on one checkpoint.

    Args:
        checkpoint: of model and heads.
        name: of the shape.
        shape: of model and heads.
        tokens: of a step.
        precision: one of `paths.PRECISIONS`.
        repeats: rounds of which the median is taken.
    """
    seconds, sites = _measure_seconds(checkpoint, shape, tokens, precision, repeats)
    gc.collect()  # model and optimizers: the processes below need room for theirs
    memory = {
        path: peak_memory(checkpoint, name, tokens, precision, path)
        for path in seconds
        if path != "floor"
    }
    floor_memory = {"floor": None}
    return {
        "sites": sites,
        "paths": {
            path: {
                "seconds": its_seconds,
                "tokens_per_second": tokens / its_seconds,
                "ratio_to_plain": its_seconds / seconds["plain"],
                "ratio_to_floor": its_seconds / seconds["floor"],
                "speedup_over_naive": seconds["naive"] / its_seconds,
                "peak_memory_bytes": (memory | floor_memory)[path],
                "peak_memory_ratio_to_plain": memory[path] / memory["plain"]
                if path in memory
                else None,
            }
            for path, its_seconds in seconds.items()
        },
    }


def _measure_seconds(
    checkpoint: Path, shape: Shape, tokens: int, precision: str, repeats: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds by path; d_sae, L0 and density by site."""
    model = load(checkpoint)
    input_ids = shape.batches(tokens)[0].to(model.device)
    with torch.no_grad():
        sites = model(input_ids=input_ids, labels=input_ids).sites
    seconds = median_seconds(steps_by_path(model, input_ids, precision), repeats)
    d_saes = {head.config.hook_name: head.config.d_sae for head in model.heads}
    l0s = {name: sites[name].losses.statistics.l0 for name in d_saes}
    return seconds, {
        name: {"d_sae": d_sae, "l0": l0s[name], "density": l0s[name] / d_sae}
        for name, d_sae in d_saes.items()
    }


def main() -> None:
    """Measure, print a table, write JSON and a figure.

    Raises:
        UserError: if there are too few tokens or repeats.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--figure", help="where cost against d_sae and L0 is drawn; or none; by "
                        "default beside the JSON, as .png")  # fmt: skip
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--story", type=int, nargs="?", const=STEPS, metavar="STEPS",
                        help="also train on every path from the same seed")  # fmt: skip
    parser.add_argument("--checkpoints", type=Path, help="folder of early, midway and late")
    parser.add_argument("--tokens", type=int, help="of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=PRECISIONS, help="by default the fastest one")
    options = parser.parse_args()

    shape, on_gpu = SHAPES[options.shape], torch.cuda.is_available()
    tokens = options.tokens or (shape.tokens if on_gpu else shape.cpu_tokens)
    if tokens < 2 or options.repeats < 1:
        raise UserError(
            f"--tokens is {tokens} and --repeats {options.repeats}; a step needs at least 2 tokens "
            "and a median at least one repeat."
        )
    if not options.json.parent.is_dir():
        raise UserError(f"There is no folder {options.json.parent} for --json; make it first.")
    draw = None
    if options.figure != "none":
        require_extra("matplotlib")
        from benchmarks.figure import draw
    folder = options.checkpoints or Path("runs/benchmarks") / options.shape
    saved = checkpoints(shape, folder)
    input_ids = shape.batches(tokens)[0]
    tokens, precision, by_precision = input_ids.numel(), options.precision, {}
    if precision is None:
        by_precision = precision_seconds(saved["late"], input_ids, options.repeats)
        precision = min(by_precision, key=by_precision.get)
    common = (shape, tokens, precision, options.repeats)
    results = {
        **conditions(),
        "shape": options.shape,
        "tokens": tokens,
        "repeats": options.repeats,
        "precision": precision,
        "seconds_by_precision": by_precision,  # on `PRECISION_PART` of the tokens
        "checkpoints": how_made(shape, folder),
        "stages": {},
    }
    for stage in options.stages:  # kept one by one: each takes minutes
        results["stages"][stage] = measure_stage(saved[stage], options.shape, *common)
        write_json(options.json, results)
    if options.story:
        results["story"] = measure_story(shape, options.story, precision)
        write_json(options.json, results)
    if draw is not None:
        results["scaling"] = measure_scaling(saved["late"], *common, DOUBLING_TURNS)
        write_json(options.json, results)
        draw(results).savefig(options.figure or options.json.with_suffix(".png"), dpi=160)
    print(text(results))


if __name__ == "__main__":
    with one_sentence_errors():
        main()
