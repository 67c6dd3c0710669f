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
  of the heads alone (`term_bf16`); the plain step of that row then has float32
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_memory
from benchmarks.naive import compiled_losses, naive_losses
from benchmarks.paths import PRECISIONS, path_names, product, steps_by_path
from benchmarks.shapes import SHAPES, Shape
from benchmarks.training import HOW, STAGES, checkpoints, fitted_head, training_run
from hf_saereg.errors import UserError, one_sentence_errors
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.run_folder import command_line, package_versions, write_json

SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of the shape's largest d_sae
L0S = (5, 10, 20, 40, 80, 160)


def median_seconds(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns; of two runs a turn only the second is timed.

    The first gives back what the one before left behind: after a path of large arrays the system
    has taken its pages away, and the next one would pay for getting some again.

    Args:
        contestants: by name.
        repeats: rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            contestant()
            start = time.perf_counter()
            contestant()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def faster_precision(checkpoint: Path, input_ids: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of our default path in each precision, and which is the fastest.

    Args:
        checkpoint: the late one.
        input_ids: (sequences, sequence).
        repeats: of each.
    """
    model = load(checkpoint)
    steps = {p: steps_by_path(model, input_ids, p)["auto"] for p in PRECISIONS}
    seconds = median_seconds(steps, repeats)
    return {"seconds": seconds, "faster": min(seconds, key=seconds.get)}


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
    model = load(checkpoint)
    input_ids = shape.batches(tokens)[0].to(model.device)
    with torch.no_grad():
        sites = model(input_ids=input_ids, labels=input_ids).sites
    seconds = median_seconds(steps_by_path(model, input_ids, precision), repeats)
    memory = {
        path: peak_memory(checkpoint, name, tokens, precision, path)
        for path in seconds
        if path != "floor"
    }
    floor_memory = {"floor": None}
    return {
        "sites": {
            head.config.hook_name: {
                "d_sae": head.config.d_sae,
                "l0": (l0 := sites[head.config.hook_name].losses.statistics.l0),
                "density": l0 / head.config.d_sae,
            }
            for head in model.heads
        },
        "paths": {
            path: {
                "seconds": its_seconds,
                "tokens_per_second": input_ids.numel() / its_seconds,
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


def measure_scaling(
    checkpoint: Path, shape: Shape, tokens: int, precision: str, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds of single heads, forward and backward, against d_sae and against L0.

    Args:
        checkpoint: the late one; heads are fitted to the activations at its last site.
        shape: of model and heads.
        tokens: of a step.
        precision: one of `paths.PRECISIONS`.
        repeats: rounds of which the median is taken.
    """
    model = load(checkpoint)
    site, input_ids = model.hook_names[-1], shape.batches(tokens)[0].to(model.device)
    with torch.no_grad(), model.reading([site]) as activations:
        model(input_ids=input_ids)
    x = activations[site].flatten(0, 1).requires_grad_()
    d_sae = max(shape.d_sae)
    grid = {
        "by_d_sae": [(round(scale * d_sae), 15.0) for scale in SCALES],
        "by_l0": [(d_sae, float(l0)) for l0 in L0S],
    }
    return {
        axis: [_head_seconds(x, *point, precision, repeats) for point in points]
        for axis, points in grid.items()
    }


def _head_seconds(
    x: Tensor, d_sae: int, target_l0: float, precision: str, repeats: int
) -> dict[str, float]:
    head = fitted_head(x.detach(), d_sae, target_l0)
    names = [name for name in path_names(x.device) if name not in ("plain", "floor", "auto")]

    def step(path: str) -> None:
        head.zero_grad()
        x.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision != "float32"):
            if path in ("naive", "compile"):
                losses = (compiled_losses() if path == "compile" else naive_losses)(head, x)
            else:
                head.kernel = path
                losses = head.losses(x)
        (losses.reconstruction + losses.sparsity).backward()
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    contestants = {path: lambda path=path: step(path) for path in names}
    contestants["product"] = lambda: product(x, head.W_enc, precision)
    l0 = head.losses(x).statistics.l0
    return {"d_sae": d_sae, "l0": l0, "seconds": median_seconds(contestants, repeats)}


def cost_of_doubling(points: list[dict[str, Any]]) -> dict[str, float]:
    """What the last doubling of d_sae adds, in units of what it adds to the encoder product alone.

    Args:
        points: of rising d_sae, the last twice the one before, with `seconds` by path.
    """
    before, after = (point["seconds"] for point in points[-2:])
    added = {path: after[path] - before[path] for path in after}
    product_added = added.pop("product")
    return {path: seconds / product_added for path, seconds in added.items()}


def measure_story(shape: Shape, steps: int, precision: str) -> dict[str, list[float]]:
    """CE + term of every step of a run from the same seed, by the path that it was trained on.

    Args:
        shape: of model, heads and batch.
        steps: of each run.
        precision: one of `paths.PRECISIONS`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        path: [loss for _, loss in training_run(shape, path, steps, precision)]
        for path in path_names(device)
        # a compiled path would be compiled anew with every coefficient
        if path not in ("plain", "floor", "compile")
    }


def load(checkpoint: Path) -> SAERegGPT2LMHeadModel:
    """A checkpoint in training mode, on the GPU where there is one."""
    model = SAERegGPT2LMHeadModel.from_pretrained(checkpoint).train()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """What the processor or GPU calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.getdevice_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['shape']}: {results['tokens']} tokens, {results['precision']}, "
        f"{results['threads']} threads, {results['device']}, medians of {results['repeats']}"
    ]
    for stage, measured in results["stages"].items():
        l0s = " ".join(f"{site['l0']:.0f}/{site['d_sae']}" for site in measured["sites"].values())
        lines.append(f"\n{stage} (L0 {l0s})")
        lines.append("  path      tokens/s   × plain   × floor   over naive   memory × plain")
        for path, figures in measured["paths"].items():
            memory = figures["peak_memory_ratio_to_plain"]
            lines.append(
                f"  {path:<8} {figures['tokens_per_second']:>9,.0f} "
                f"{figures['ratio_to_plain']:>9.2f} {figures['ratio_to_floor']:>9.2f} "
                f"{figures['speedup_over_naive']:>12.2f} "
                f"{'–' if memory is None else f'{memory:.2f}':>16}"
            )
    if doubling := results.get("cost_of_doubling_d_sae"):
        before, after = (point["d_sae"] for point in results["scaling"]["by_d_sae"][-2:])
        costs = ", ".join(f"{path} {cost:.2f}" for path, cost in doubling.items())
        lines.append(f"\nd_sae {before} → {after} adds, × the encoder product's addition: {costs}")
    return "\n".join(lines)


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
    parser.add_argument("--story", type=int, nargs="?", const=300, metavar="STEPS",
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
    folder = options.checkpoints or Path("runs/benchmarks") / options.shape
    saved = checkpoints(shape, folder)
    device = torch.device("cuda" if on_gpu else "cpu")
    by_precision = faster_precision(
        saved["late"], shape.batches(tokens)[0].to(device), options.repeats
    )
    precision = options.precision or by_precision["faster"]
    common = (shape, tokens, precision, options.repeats)
    results = {
        "command": command_line(),
        "versions": package_versions(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "shape": options.shape,
        "tokens": shape.batches(tokens)[0].numel(),
        "repeats": options.repeats,
        "precision": precision,
        "seconds_by_precision": by_precision["seconds"],
        "checkpoints": {"how": HOW, "after_part_of_the_steps": STAGES, "of": shape.training_steps},
        "stages": {
            stage: measure_stage(checkpoint, options.shape, *common)
            for stage, checkpoint in saved.items()
        },
    }
    if options.story:
        results["story"] = measure_story(shape, options.story, precision)
    if options.figure != "none":
        from benchmarks.figure import draw  # matplotlib is an extra

        results["scaling"] = measure_scaling(saved["late"], *common)
        results["cost_of_doubling_d_sae"] = cost_of_doubling(results["scaling"]["by_d_sae"])
        draw(results).savefig(options.figure or options.json.with_suffix(".png"), dpi=160)
    write_json(options.json, results)
    print(_table(results))


if __name__ == "__main__":
    with one_sentence_errors():
        main()
