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
    """The launched processes cannot work together; the message says how to start them."""


def launched_processes() -> int:
    """How many a launcher started, this one among them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several_processes(instead: str) -> None:
    """Refuse to be launched more than once at a time, where each process would do all the work.

    Args:
        instead: what to do; the end of the sentence.

    Raises:
        ProcessesError: if several processes were launched.
    """
    launched = launched_processes()
    if launched > 1:
        raise ProcessesError(
            f"{launched} processes were launched, but each would do all the work; {instead}"
        )


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
    check_joined(accelerator.num_processes)
    return accelerator


def check_joined(processes: int) -> None:
    """Check that all that were launched are joined: otherwise each would do the work of all.

    Args:
        processes: that this one is joined to, itself among them.

    Raises:
        ProcessesError: if they are not.
    """
    launched = launched_processes()
    if processes != launched:
        raise ProcessesError(
            f"{launched} processes were launched, but this one is joined to {processes}; launch "
            "them with recipes/accelerate/cpu_2.yaml, or add --use_cpu true on a machine whose "
            "GPUs are not to be used."
        )
