"""Processes killed with SIGKILL: the job ends, and what it left is whole or not taken."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from killed_job import job
from launching import TWO_PROCESSES, launch_two

from hf_saereg.resuming import STATE_FILE, last_complete_checkpoint

JOB = Path(__file__).parent / "killed_job.py"
MINUTE = 60  # seconds
PATIENCE = 5 * MINUTE  # with two programs that start on a machine that is busy

pytestmark = pytest.mark.slow


def start_two(*words):
    """The launcher's process, without waiting for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES]
    return subprocess.Popen(
        [str(word) for word in (*launch, "--main_process_port", port, *words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("waited in vain")


def states(folder):
    return [torch.load(folder / f"state_{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    launch_two(JOB, folder, 8)
    return states(folder)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_ends_the_job_with_an_error_and_the_last_checkpoint_resumes(tmp_path, killed):
    process = start_two(JOB, tmp_path, 100_000)
    wait_for(lambda: last_complete_checkpoint(tmp_path / "run"), process)
    start = time.monotonic()
    os.kill(int((tmp_path / f"pid_{killed}").read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=MINUTE)
    assert time.monotonic() - start < MINUTE and process.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in errors and f"rank      : {killed}" in errors
    for rank in (0, 1):  # none is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid_{rank}").read_text()), 0)
    last = last_complete_checkpoint(tmp_path / "run")
    step = int(last.name.split("-")[1])
    launch_two(JOB, tmp_path, step + 2)
    log = json.loads((tmp_path / "run" / f"checkpoint-{step + 2}" / STATE_FILE).read_text())
    assert log["global_step"] == step + 2


def test_a_checkpoint_that_one_process_has_not_finished_is_not_taken(tmp_path, uninterrupted):
    """The first has written all of its own by then."""
    process = start_two(JOB, tmp_path, 8, "in_checkpoint")
    process.communicate(timeout=PATIENCE)
    unfinished = tmp_path / "run" / "checkpoint-4"
    assert (unfinished / "rng_state_0.pth").exists() and (unfinished / "saes").is_dir()
    assert not (unfinished / "rng_state_1.pth").exists()
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-2"
    launch_two(JOB, tmp_path, 8)
    for ours, expected in zip(states(tmp_path), uninterrupted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# ---- one process, killed at every file of a checkpoint ----


def killed_at(point, folder):
    """Train in a child that is killed at a file of the checkpoint of step 4; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            kill_at(point)
            job(folder, 4).train()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_at(point):
    reached = 0

    def reach(path, half=None):
        nonlocal reached
        if "checkpoint-4" not in str(path):
            return
        reached += 1
        if reached == point:
            if half is not None:
                half()
                os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event, arguments):
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax"):
            reach(arguments[0])
        elif event in ("os.mkdir", "os.rename", "os.remove"):
            reach(arguments[-3] if event == "os.rename" else arguments[0])

    sys.addaudithook(audited)  # what Python opens; tensors are written by other means
    for module, name, position in (
        (torch, "save", 1),
        (safetensors.torch, "save_file", 1),
    ):
        write = getattr(module, name)

        def watched(*args, write=write, position=position, **kwargs):
            reach(args[position], half=lambda: write(*args, **kwargs))
            write(*args, **kwargs)

        for user in list(sys.modules.values()):
            if getattr(user, name, None) is write:
                setattr(user, name, watched)


def test_killed_at_any_file_of_a_checkpoint_it_resumes_from_a_whole_one(tmp_path):
    whole = job(tmp_path / "whole", 6)
    whole.train()
    expected = whole.model.state_dict()
    points, last_steps = 0, []
    while killed_at(points + 1, tmp_path / f"killed_{points + 1}"):
        points += 1
        folder = tmp_path / f"killed_{points}"
        last = last_complete_checkpoint(folder)
        last_steps.append(last.name)
        if points % 4 and last.name == "checkpoint-2":
            continue  # resuming is tested at every fourth
        again = job(folder, 6)
        torch.nn.init.normal_(again.model.transformer.wte.weight)
        again.train(resume_from_checkpoint=last)
        torch.testing.assert_close(again.model.state_dict(), expected, rtol=0, atol=0)
    assert points > 20 and last_steps[0] == "checkpoint-2"
    assert last_steps == sorted(last_steps)  # never a half-written one in between
