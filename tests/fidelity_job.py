"""Scores the heads of a tiny model, for tests: imported, or started by `accelerate launch`.

    accelerate launch … tests/fidelity_job.py FOLDER

Every process writes what it found to a file of its own.
"""

import json
import sys
from pathlib import Path

import torch
from training_job import CONTEXT, arguments, collate, heads, rows, tiny_model, trainer

from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.processes import start_accelerator

BATCHES = {"one": 1, "two": 2, "five": 5}  # one is fewer than the processes, five is uneven


def text(number, seed=4):
    """Padded rows in batches of two or, at last, one."""
    lengths = [CONTEXT - i % 5 for i in range(2 * number - 1)]
    found = rows(lengths, seed)
    return [collate(found[i : i + 2]) for i in range(0, len(found), 2)]


def saved_model(folder):
    """A model with heads in `folder`, in single precision."""
    model = tiny_model(heads(), seed=7, dtype=torch.float32)
    with torch.no_grad():
        for head in model.heads:
            head.b_enc.normal_(std=0.3)
    model.save_pretrained(folder)


def run(folder, accelerator):
    """Figures of every text, and those of a trainer's evaluation of the longest."""
    model = SAERegGPT2LMHeadModel.from_pretrained(folder / "model").eval()
    found = {"world_size": accelerator.num_processes}
    for name, number in BATCHES.items():
        batches = text(number)
        base = baselines(model, batches, accelerator)
        scores = fidelity(model, model.heads, batches, base, accelerator)
        fired = {site: own.statistics.fired.tolist() for site, own in scores.sites.items()}
        found[name] = {"base": base._asdict(), "figures": scores.figures(), "fired": fired}
    args = arguments(folder / "trainer", eval_fidelity=True)
    dataset = rows([CONTEXT - i % 5 for i in range(9)], 4)
    metrics = trainer(model, args, eval_dataset=dataset).evaluate()
    found["evaluated"] = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return found


if __name__ == "__main__":
    accelerator = start_accelerator()
    folder = Path(sys.argv[1])
    found = run(folder, accelerator)
    path = folder / f"found_{accelerator.process_index}.json"
    path.write_text(json.dumps(found))
