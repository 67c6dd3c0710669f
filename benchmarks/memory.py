"""Peak memory of one step on one path, in a process of its own.

    python -m benchmarks.memory CHECKPOINT SHAPE TOKENS PRECISION PATH

Notable:
- what was resident before the step does not count: weights, optimizer states, libraries and
  compiled code are there already, brought in by a step on a few tokens
- arrays of 256 KiB and more are mapped one by one, and given back when they are freed: what the C
  library would keep for later differs from run to run by a third of the plain step
- on a CPU the system's own high-water mark is read from /proc, and reset before the step: unlike
  `ru_maxrss` it then knows nothing of how the process was started and loaded
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.paths import load, steps_by_path
from benchmarks.shapes import SHAPES

WARM_UP_TOKENS = 16


def peak_memory(checkpoint: Path, shape: str, tokens: int, precision: str, path: str) -> int:
    """Bytes that a step takes at its peak, measured in a fresh process.

    Args:
        checkpoint: of model and heads.
        shape: its name.
        tokens: of the step.
        precision: one of `paths.PRECISIONS`.
        path: one of `paths.path_names`.
    """
    words = [str(checkpoint), shape, str(tokens), precision, path]
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # glibc's name for it
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what the command line says, and print a number of bytes."""
    checkpoint, shape, tokens, precision, path = sys.argv[1:]
    model = load(checkpoint)
    input_ids = SHAPES[shape].batches(int(tokens))[0].to(model.device)
    steps_by_path(model, input_ids[:1, :WARM_UP_TOKENS], precision)[path]()
    step = steps_by_path(model, input_ids, precision)[path]
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _high_water_mark()
    step()
    print(_high_water_mark() - before)


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    main()
