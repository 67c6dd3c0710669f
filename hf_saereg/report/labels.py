"""What models of several runs are called, where some have the same name.

Notable:
- the end of the run's path tells them apart, as little of it as that takes
"""

from collections.abc import Sequence
from pathlib import Path


def labels_of(models: Sequence[tuple[Path, str]]) -> list[str]:
    """A label each: the name where it is the only one, else with the end of its run's path.

    Args:
        models: the run's folder and the model's name.
    """
    folders: dict[str, list[Path]] = {}
    for folder, name in models:
        folders.setdefault(name, []).append(folder.resolve())
    return [
        name if len(folders[name]) == 1 else f"{name} ({_end(folder.resolve(), folders[name])})"
        for folder, name in models
    ]


def _end(folder: Path, all_folders: Sequence[Path]) -> str:
    different = set(all_folders)
    parts = next(
        number
        for number in range(1, max(len(own.parts) for own in different) + 1)
        if len({own.parts[-number:] for own in different}) == len(different)
    )
    return str(Path(*folder.parts[-parts:]))
