"""The processes that share a command's work: one, or as many as `accelerate launch` started.

Notable:
- launched on CPUs, `Accelerator()` alone takes every process for the only one, and each would do
  all the work: it is told of the CPU where there is nothing else, and the numbers are compared
- one process may work for hours longer than another, so none gives up waiting
"""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from hf_saereg.errors import UserError

PATIENCE = timedelta(days=30)


class ProcessesError(UserError):
    """The processes do not know of each other; the message says how to start them."""


def start_accelerator(use_cpu: bool = False) -> Accelerator:
    """The accelerator of this process, joined to the others that were launched with it.

    Args:
        use_cpu: even where there is a GPU.

    Raises:
        ProcessesError: if fewer processes are joined than were launched.
    """
    cpu = use_cpu or not torch.accelerator.is_available()
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patience])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ProcessesError(
            f"{launched} processes were launched, but this one is joined to "
            f"{accelerator.num_processes}; launch them with recipes/accelerate/cpu_2.yaml, or add "
            "--use_cpu true on a machine whose GPUs are not to be used."
        )
    return accelerator
