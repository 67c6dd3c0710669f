"""Trainings that run one after the other on two processes, for tests; or on one, for comparison.

    accelerate launch … tests/two_processes_job.py FOLDER

`FOLDER/heads` holds trained heads. What every process found is in `FOLDER/RANK_NAME.pt`.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from training_job import (
    CONTEXT,
    LENGTHS,
    SITES,
    arguments,
    rows,
    tiny_model,
    trainer,
    upkept_heads,
)
from transformers import Trainer

from hf_saereg import upkeep
from hf_saereg.adaptation import ADAPTED, AdaptationArguments, adapt
from hf_saereg.heads.folder import load_head
from hf_saereg.regularizer import TermOptions

# where the trainer asks other processes, by the function that does
REDUCTIONS = ("get_batch_samples", "on_optimizer_step", "log", "read", "evaluation_loop")
# and where its base and DDP do
OTHERS = ("number of predicted tokens", "gradients")
MODES = ("lora", "lora_frozen_heads", "heads")


def upkept():
    return tiny_model(upkept_heads(), term=TermOptions(sites_per_step=2, splice_weight=0.3))


def in_mode(mode, heads):
    """A model in a mode, its adapters as after some training."""
    model = tiny_model(seed=4)
    frozen = mode == "lora_frozen_heads"
    options = {"heads_from": str(heads)} if frozen else {}
    configs = [load_head(heads, site).config for site in SITES[1:]] if frozen else upkept_heads()
    lora = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0} if mode in ADAPTED else {}
    term = TermOptions(splice_loss="kl") if frozen else None
    torch.manual_seed(5)
    adapt(model, AdaptationArguments(mode=mode, **lora, **options), configs, term)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def train(model, folder, resume=None, lengths=LENGTHS, **options):
    """What comes out of four steps: weights, buffers, logs, and the rows that were seen."""
    defaults = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    defaults |= {"train_sampling_strategy": "random"}
    args = arguments(folder, **(defaults | options))
    # the last round has one row for two processes that take two each
    evaluated = rows([CONTEXT, 5, 7, 3, 11], seed=2)
    ours = trainer(model, args, rows(lengths), eval_dataset=evaluated)
    seen, training_step = [], ours.training_step

    def watched(model, inputs, *rest):
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return training_step(model, inputs, *rest)

    ours.training_step = watched
    ours.train(resume_from_checkpoint=resume)
    described = folder.parent / "described" / f"{folder.name}_by_{args.process_index}"
    described.mkdir(parents=True, exist_ok=True)
    ours.describe(described)
    return {
        "described": {path.name for path in described.iterdir()},
        "world_size": args.world_size,
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "log": ours.state.log_history,
        "seen": seen,
    }


def resampled_by_one(folder):
    """Five steps: in the second the second process has no token to read, in the fourth the first.

    Heads skip the whole of the short rows.
    """
    model = tiny_model(upkept_heads(skip_positions=3, dead_after_tokens=1))
    lengths = [3, 3, CONTEXT, 5, 7, 8, 2, 3, 9, 6, 11, 8]  # a step takes four, two a process
    options = {"max_steps": 5, "train_sampling_strategy": "sequential", "optim": "adamw_torch"}
    options |= {"kernel": "dense"}  # otherwise each process chooses by its own tokens
    return train(model, folder, lengths=lengths, resample_every=2, **options)


def evaluate(model, folder):
    """Figures of one row: in an evaluation on two processes the second has none of its own."""
    ours = trainer(model, arguments(folder, eval_base=True), eval_dataset=rows([7], seed=6))
    figures = ours.evaluate()
    del figures["eval_model_preparation_time"]
    return {"state": {}, "log": [figures]}


@contextmanager
def without(reduction):
    """Every process keeps to itself what it should share."""
    reduce, number = Accelerator.reduce, Trainer._get_num_items_in_batch
    forward = DistributedDataParallel.forward

    def own(self, tensor, *args, **kwargs):
        asked = sys._getframe(1).f_code.co_name
        return tensor if asked == reduction else reduce(self, tensor, *args, **kwargs)

    def unsynchronised(self, *inputs, **kwargs):
        with self.no_sync():
            return forward(self, *inputs, **kwargs)

    def own_number(self, samples, device):
        return sum((sample["labels"][:, 1:] != -100).sum() for sample in samples)

    broadcast = upkeep.broadcast
    Accelerator.reduce = own
    if reduction == "broadcast":
        upkeep.broadcast = lambda tensor: tensor
    if reduction == "gradients":
        DistributedDataParallel.forward = unsynchronised
    if reduction == "number of predicted tokens":
        Trainer._get_num_items_in_batch = own_number
    try:
        yield
    finally:
        Accelerator.reduce, DistributedDataParallel.forward = reduce, forward
        Trainer._get_num_items_in_batch = number
        upkeep.broadcast = broadcast


def trainings(folder, **options):
    """By name."""
    shared = folder / "shared"  # the second process writes its random state alone
    yield "whole", train(upkept(), shared, save_strategy="steps", save_steps=2, **options)
    yield "plain", train(tiny_model(), folder / "plain", **options)
    for mode in MODES:
        own = options | {"anchor_weight": 2.0 if mode == "lora" else 0.0, "eval_base": True}
        yield mode, train(in_mode(mode, folder / "heads"), folder / mode, **own)
    yield "one row", evaluate(upkept(), folder / "one_row")
    frozen = in_mode("lora_frozen_heads", folder / "heads")
    yield "one row, frozen heads", evaluate(frozen, folder / "one_row")


def on_two(folder):
    yield from trainings(folder)
    checkpoint = folder / "shared" / "checkpoint-2"
    yield "resumed", train(upkept(), folder / "resumed", resume=checkpoint)
    for reduction in REDUCTIONS + OTHERS:
        with without(reduction):
            yield f"without {reduction}", train(upkept(), folder / "without")
    with without("read"):
        yield "plain without read", train(tiny_model(), folder / "without")
    yield "resampled", train(upkept(), folder / "resampled", resample_every=2)
    with without("broadcast"):
        own = train(upkept(), folder / "without", resample_every=2)
        yield "resampled without broadcast", own
    yield "resampled, one without tokens", resampled_by_one(folder / "resampled")


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for name, result in on_two(folder):
        torch.save(result, folder / f"{rank}_{name}.pt")
    shutil.rmtree(folder / "without", ignore_errors=True)
