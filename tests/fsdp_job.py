"""Sharded steps on two processes, for a test.

accelerate launch … tests/fsdp_job.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_job import collate, rows, tiny_model, upkept_heads

from hf_saereg.regularizer import TermOptions
from hf_saereg.sharding import load_full_state

STEPS, RATE = 3, 0.05  # not Adam: it makes noise of gradients that are 0


def fresh_model():
    model = tiny_model(upkept_heads(), term=TermOptions(splice_weight=0.3))
    for head in model.heads:
        # the compiled CPU kernel lends a parameter's memory to NumPy, and FSDP then cannot free it
        head.kernel = "dense"
    return model


def batch_of(step, rank):
    return collate(rows()[4 * step + 2 * rank :][:2])


def losses(model, step, rank):
    """CE + term of a process's rows, and what the heads saw."""
    output = model(**batch_of(step, rank), term_step=step, term_draw=rank)
    seen = {name: site.losses.statistics for name, site in output.sites.items()}
    return output.loss + output.term + 0.3 * output.spliced_loss, seen


def observe(model, seen):
    for head in model.heads:
        statistics = [part[head.config.hook_name] for part in seen]
        fired = sum(part.fired for part in statistics)
        head.observe(fired, sum(part.tokens for part in statistics))


def run(folder, rank):
    mesh = init_device_mesh("cpu", (2,))
    model = fresh_model()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    head = next(iter(model.heads))
    assert head.W_dec.to_local().shape[0] == head.W_dec.shape[0] // 2
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    found = []
    for step in range(STEPS):
        loss, seen = losses(model, step, rank)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        of_all = [None, None]
        dist.all_gather_object(of_all, seen)
        observe(model, of_all)
        found.append(loss.item())
    torch.save(found, folder / f"losses_{rank}.pt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save(whole, folder / "state.pt")
    model.save_pretrained(folder / "checkpoint", is_main_process=rank == 0, state_dict=whole)
    dist.barrier()

    # what was saved goes back into shards
    saved = type(model).from_pretrained(folder / "checkpoint", dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_full_state(model, saved.state_dict())
    again = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save(again, folder / "again.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run(Path(sys.argv[1]), int(os.environ["RANK"]))
    dist.destroy_process_group()
