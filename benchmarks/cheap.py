"""What the cheap modes of the term save: a share of the tokens, or some of the sites a step.

    python -m benchmarks.cheap --shape published --json benchmarks/results/cheap.json

Notable:
- on the late checkpoint of `benchmarks.step`, which is made on first use
- a turn is as many steps as there are sites, so that a rotating subset comes round to every site
- what the modes do to the features is the business of recipes/study_families.yaml
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.paths import adamw, load, run_path
from benchmarks.shapes import SHAPES
from benchmarks.timing import conditions, median_seconds
from benchmarks.training import checkpoints
from hf_saereg.errors import UserError, one_sentence_errors
from hf_saereg.run_folder import write_json

FRACTIONS = (1.0, 0.5, 0.25, 0.125)
PLAIN = "plain"
WHOLE = {"token_fraction": 1.0, "sites_per_step": None}


def measure(checkpoint: Path, input_ids: torch.Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step in every mode, and their ratio to the plain step's.

    Args:
        checkpoint: of model and heads.
        input_ids: (sequences, sequence).
        repeats: turns of which the median is taken.
    """
    model = load(checkpoint)
    input_ids, n_sites = input_ids.to(model.device), len(model.heads)
    modes: dict[str, dict[str, Any]] = {PLAIN: {}}
    modes |= {f"token_fraction {share:g}": {"token_fraction": share} for share in FRACTIONS}
    modes |= {f"sites_per_step {n}": {"sites_per_step": n} for n in range(n_sites - 1, 0, -1)}
    optimizers = {
        True: adamw(model.plain_view().parameters()),
        False: adamw(model.parameters()),
    }

    def turn(mode: str) -> Callable[[], None]:
        def steps() -> None:
            model.term = replace(model.term, **WHOLE | modes[mode])
            path = PLAIN if mode == PLAIN else "auto"
            for step in range(n_sites):
                run_path(path, model, optimizers[mode == PLAIN], input_ids, "float32", step)
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        return steps

    seconds = median_seconds({mode: turn(mode) for mode in modes}, repeats)
    return {
        mode: {"seconds": its / n_sites, "ratio_to_plain": its / seconds[PLAIN]}
        for mode, its in seconds.items()
    }


def main() -> None:
    """Measure, print a table, write JSON.

    Raises:
        UserError: if there are no repeats.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--checkpoints", type=Path, help="folder of early, midway and late")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}; a median needs at least one repeat.")
    shape = SHAPES[options.shape]
    tokens = shape.tokens if torch.cuda.is_available() else shape.cpu_tokens
    saved = checkpoints(shape, options.checkpoints or Path("runs/benchmarks") / options.shape)
    input_ids = shape.batches(tokens)[0]
    results = {
        **conditions(),
        "shape": options.shape,
        "tokens": input_ids.numel(),
        "repeats": options.repeats,
        "modes": measure(saved["late"], input_ids, options.repeats),
    }
    write_json(options.json, results)
    print(f"{options.shape}: {input_ids.numel()} tokens a step, {results['threads']} threads")
    for mode, figures in results["modes"].items():
        print(f"  {mode:<22} {figures['seconds']:.3f} s, {figures['ratio_to_plain']:.2f} × plain")


if __name__ == "__main__":
    with one_sentence_errors():
        main()
