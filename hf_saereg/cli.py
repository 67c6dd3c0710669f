"""`saereg`: what comes after training, as commands.

    saereg sweep MODEL --dataset TEXT …     fresh SAEs on a model, scored
    saereg report RUN… --output_dir OUT     what sweeps found, as a page
    saereg compare STUDY.yaml …             variants of a training at several seeds, compared
    saereg features MODEL [MODEL] …         what the latents of a head stand for, as a page
    saereg quality RUN… --dataset TEXT      whether latents are better, or packed
    saereg push DIR REPO                    a checkpoint, its heads and its card to the Hub

Notable:
- the first words are a command's subject, all others are its options, also from `--config FILE`
- under `accelerate launch`: `accelerate launch … -m hf_saereg.cli sweep MODEL …`
- a command's module is imported when it is called
"""

import difflib
import itertools
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from hf_saereg.errors import UserError, one_sentence_errors


class Command(NamedTuple):
    """One command.

    Attributes:
        module: with `main(words)`.
        subject: options that the first words are the values of, one a word; the last takes all
            that remain.
        usage: how to call it.
        purpose: in one line.
    """

    module: str
    subject: tuple[str, ...]
    usage: str
    purpose: str


COMMANDS = {
    "sweep": Command(
        "hf_saereg.commands.sweep",
        ("model",),
        "MODEL --dataset TEXT --output_dir DIR",
        "train fresh SAEs on every site of a GPT-2 and score them",
    ),
    "report": Command(
        "hf_saereg.commands.report",
        ("runs",),
        "RUN… --output_dir OUT",
        "write what runs found as a page to open",
    ),
    "table": Command(
        "hf_saereg.commands.table",
        ("runs",),
        "RUN…",
        "print what fine-tunings led to, and what fresh SAEs cost there, a line a run",
    ),
    "compare": Command(
        "hf_saereg.commands.compare",
        ("study",),
        "STUDY.yaml --output_dir DIR",
        "train variants at several seeds, score and compare them, paired by seed",
    ),
    "features": Command(
        "hf_saereg.commands.features",
        ("models",),
        "MODEL [MODEL] --hook_name HOOK_NAME --dataset TEXT --output_dir DIR",
        "show what the latents of a head stand for, of two models side by side",
    ),
    "quality": Command(
        "hf_saereg.commands.quality",
        ("runs",),
        "RUN… --dataset TEXT",
        "measure whether the features of runs are better, or packed",
    ),
    "push": Command(
        "hf_saereg.commands.push",
        ("folder", "repo"),
        "DIR REPO",
        "publish a checkpoint, its heads and its card on the Hub",
    ),
}


def main(words: Sequence[str] | None = None) -> None:
    """Run the command that the words name.

    Args:
        words: a command line without the program; that of this program by default.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    with one_sentence_errors():
        name, *rest = words
        if name not in COMMANDS:
            nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"There is no command {name!r}; did you mean {nearest!r}? `saereg --help` lists "
                "them all."
            )
        command = COMMANDS[name]
        import_module(command.module).main(with_subject(command.subject, rest))


def with_subject(options: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words with those before the first option as values of some options.

    Args:
        options: their names; each takes one word, the last all that remain.
        words: after the command.
    """
    subject = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    named = []
    for i, option in enumerate(options[: len(subject)]):
        rest = None if i == len(options) - 1 else i + 1
        named += [f"--{option}", *subject[i:rest]]
    return [*named, *words[len(subject) :]]


def usage() -> str:
    """All commands, a line each."""
    lines = ["usage: saereg COMMAND …", ""]
    for name, command in COMMANDS.items():
        lines += [f"  saereg {name} {command.usage}", f"      {command.purpose}"]
    return "\n".join([*lines, "", "`saereg COMMAND --help` lists a command's options."])


if __name__ == "__main__":
    main()
