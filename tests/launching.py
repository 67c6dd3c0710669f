"""Starting a script on two processes, for tests."""

import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TWO_PROCESSES = REPOSITORY / "recipes" / "accelerate" / "cpu_2.yaml"


def launch_two(*words, timeout=120):
    """Run a script, or `-m MODULE`, with its words; fails with what it wrote to stderr."""
    with socket.socket() as free:  # other launches on this machine have the default port
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES]
    launch += ["--main_process_port", port]
    done = subprocess.run(
        [*map(str, launch), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
