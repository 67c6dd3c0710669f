"""Sharded steps on two processes, of a model and of adapters on one, for a test.

accelerate launch … tests/fsdp_job.py FOLDER

`FOLDER/base` holds a plain model.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_job import arguments, collate, rows, tiny_model, trainer, upkept_heads

from hf_saereg.adaptation import AdaptationArguments, adapt
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.regularizer import TermOptions
from hf_saereg.sharding import load_full_state

STEPS, RATE = 3, 0.05  # not Adam: it makes noise of gradients that are 0


TERM = TermOptions(splice_weight=0.3)


def fresh_model():
    return on_dense_kernel(tiny_model(upkept_heads(), term=TERM))


def fresh_adapter(base):
    """Adapters, as after some training, on the plain model in a folder."""
    model = SAERegGPT2LMHeadModel.from_pretrained(base, dtype=torch.float64)
    torch.manual_seed(5)
    lora = AdaptationArguments(mode="lora", lora_r=2, lora_alpha=4, lora_dropout=0.0)
    adapt(model, lora, upkept_heads(), TERM)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return on_dense_kernel(model.double().train())


def on_dense_kernel(model):
    """The compiled one on a CPU lends a parameter's memory to NumPy, and FSDP cannot free it."""
    for head in model.heads:
        head.kernel = "dense"
    return model


def shard(model):
    """As accelerate does with recipes/accelerate/fsdp2.yaml, which it takes to GPUs only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("fsdp",)),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(accelerator, model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert isinstance(model.transformer.wte, FSDPModule) and not isinstance(model.heads, FSDPModule)
    head = next(iter(model.heads))
    assert head.W_dec.to_local().shape[0] == head.W_dec.shape[0] // 2


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
    model = fresh_model()
    shard(model)
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
    whole = gathered(model)
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
    again = gathered(model)
    if rank == 0:
        torch.save(again, folder / "again.pt")


def gathered(model):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def run_adapter(folder, rank):
    """A step of the adapters; saved by a trainer, and merged."""
    model = fresh_adapter(folder / "base")
    shard(model)
    loss, _ = losses(model, 0, rank)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=RATE).step()
    ours = trainer(model, arguments(folder / "adapter"))
    ours._save(state_dict=gathered(model))
    ours.save_merged(folder / "merged")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    run(folder, rank)
    run_adapter(folder, rank)
    dist.destroy_process_group()
