"""Whether all paths train alike: losses of a run from the same seed on every path.

    python -m benchmarks.story benchmarks/results/published.json

Adds the losses to what `benchmarks.step` wrote, and draws its figure again with them; `--story` of
`benchmarks.step` does the same at once.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.paths import path_names
from benchmarks.shapes import SHAPES, Shape
from benchmarks.training import training_run
from hf_saereg.errors import UserError, one_sentence_errors
from hf_saereg.run_folder import write_json

STEPS = 300
TOKENS = 1024  # of a step


def measure_story(shape: Shape, steps: int, precision: str) -> dict[str, list[float]]:
    """CE + term of every step of a run from the same seed, by the path that it was trained on.

    Args:
        shape: of model and heads.
        steps: of each run, `TOKENS` a step.
        precision: one of `paths.PRECISIONS`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        path: [loss for _, loss in training_run(shape, path, steps, TOKENS, precision)]
        for path in path_names(device)
        # a compiled path would be compiled anew with every coefficient
        if path not in ("plain", "floor", "compile")
    }


def largest_difference(story: dict[str, list[float]]) -> float:
    """How far any path's loss is from the naive one's at any step, relative."""
    naive = torch.tensor(story["naive"])
    losses = torch.tensor(list(story.values()))  # (paths, steps)
    return ((losses - naive) / naive).abs().max().item()


def main() -> None:
    """Train, add to the JSON, draw, and print the largest difference.

    Raises:
        UserError: if the file is not what a figure is drawn from.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what benchmarks.step wrote, with its figure")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    results = json.loads(options.json.read_text())
    if "scaling" not in results:
        raise UserError(f"{options.json} has no `scaling` to draw; make it with benchmarks.step, "
                        "without --figure none.")  # fmt: skip
    from benchmarks.figure import draw  # matplotlib is an extra

    shape = SHAPES[results["shape"]]
    results["story"] = measure_story(shape, options.steps, results["precision"])
    write_json(options.json, results)
    draw(results).savefig(options.json.with_suffix(".png"), dpi=160)
    difference = largest_difference(results["story"])
    print(f"{options.steps} steps: no loss is farther than {difference:.1e} from the naive path's")


if __name__ == "__main__":
    with one_sentence_errors():
        main()
