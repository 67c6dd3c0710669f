"""Medians of contestants that take turns, and what they ran on."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_saereg.run_folder import command_line, package_versions


def median_seconds(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns; of two runs a turn only the second is timed.

    The first gives back what the one before left behind: after a path of large arrays the system
    has taken its pages away, and the next one would pay for getting some again. Each round begins
    with another one, so that none always follows the same.

    Args:
        contestants: by name.
        repeats: rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            contestants[name]()
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _device_name() -> str:
    """What the processor or GPU calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def conditions() -> dict[str, Any]:
    """What every file of figures begins with: the command, and what it ran on."""
    return {
        "command": command_line(),
        "versions": package_versions(),
        "device": _device_name(),
        "threads": torch.get_num_threads(),
    }
