"""Which checkpoint of an interrupted training is whole."""

import json
from pathlib import Path

SESSION_FILE = "saereg_session.json"
STATE_FILE = "trainer_state.json"  # written last


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end, None when there is none.

    A process killed while it wrote leaves a folder without a readable `trainer_state.json`.

    Args:
        output_dir: folder of a run.
    """
    complete = [
        folder
        for folder in output_dir.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit() and _is_json(folder / STATE_FILE)
    ]
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
