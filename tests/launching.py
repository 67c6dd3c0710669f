"""Starting Python in processes of their own, for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
THE_USERS = ("HF_TOKEN", "HF_HUB", "HUGGING")
TWO_PROCESSES = REPOSITORY / "recipes" / "accelerate" / "cpu_2.yaml"


def start_python(*words, folder=None, timeout=600, python=sys.executable, **variables):
    """A script with its words, `-m MODULE` or `-c CODE`, run to its end.

    Args:
        words: after `python`.
        folder: that it starts in.
        timeout: seconds.
        python: the interpreter.
        variables: of the environment, in place of those here; neither a token nor a cache of the
            user's gets there.

    Returns:
        The process, with what it wrote as text.
    """
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(THE_USERS)}
    paths = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [str(python), *map(str, words)],
        cwd=folder,
        env=inherited | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def stdout_of(done):
    """What a process wrote to stdout; fails with what it wrote to stderr."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(*words, **options):
    """As `start_python`; fails with what it wrote to stderr, or returns what it wrote to stdout."""
    return stdout_of(start_python(*words, **options))


def launch_two(*words, **options):
    """As `start_two`; fails with what it wrote to stderr, or returns what it wrote to stdout."""
    return stdout_of(start_two(*words, **options))


def start_two(*words, timeout=300, **variables):
    """Run a script, or `-m MODULE`, with its words in two processes, to its end.

    Args:
        words: after `accelerate launch`.
        timeout: seconds.
        variables: of the environment.
    """
    with socket.socket() as free:  # other launches on this machine have the default port
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES]
    return start_python(*launch, "--main_process_port", port, *words, timeout=timeout, **variables)
