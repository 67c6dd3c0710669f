"""A training on two processes that is killed, for tests.

    accelerate launch … tests/killed_job.py FOLDER MAX_STEPS [in_checkpoint]

With `in_checkpoint` the second process kills all, while it writes its own part of the checkpoint of
step 4, after the first has written its part.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from training_job import CONTEXT, arguments, rows, tiny_model, trainer, upkept_heads
from transformers import Trainer

from hf_saereg.resuming import last_complete_checkpoint

LATE = 3  # seconds


def job(folder, max_steps, **options):
    defaults = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 2}
    defaults |= {"optim": "adamw_torch", "learning_rate": 0.01, "logging_steps": 1000}
    model = tiny_model(upkept_heads())
    return trainer(model, arguments(folder, **(defaults | options)), rows([CONTEXT] * 12))


def kill_both_late(save, folder):
    """What takes the place of `Trainer._save_rng_state`."""

    def late(self, output_dir):
        if output_dir.endswith("-4"):
            time.sleep(LATE)
            os.kill(int((folder / "pid_0").read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    return late


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    ours = job(folder / "run", int(sys.argv[2]))
    if "in_checkpoint" in sys.argv and rank == "1":
        Trainer._save_rng_state = kill_both_late(Trainer._save_rng_state, folder)
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    ours.train(resume_from_checkpoint=last_complete_checkpoint(folder / "run"))
    torch.save(ours.model.state_dict(), folder / f"state_{rank}.pt")
