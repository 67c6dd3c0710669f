"""`saereg table`: what fine-tunings led to, as a Markdown table, a line a run.

    saereg table RUN…

Notable:
- a run is a folder of `recipes/finetune_gpt2.py`; with the folder of `saereg sweep` inside it,
  called `sweep`, the table has what fresh SAEs cost there
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_saereg.options import parse_options
from hf_saereg.report.tuned import markdown, read_tuned


@dataclass
class TableArguments:
    """Options of the table."""

    runs: list[str] = field(metadata={"help": "Folders of fine-tunings."})


def main(words: Sequence[str]) -> None:
    """Print the table.

    Raises:
        UserError: if a run cannot be read, or runs cannot stand side by side.
    """
    (arguments,) = parse_options(TableArguments, arguments=words)
    print(markdown(read_tuned([Path(run).expanduser() for run in arguments.runs])), end="")
