"""`saereg push`: a checkpoint, its heads and its card to the Hub.

    saereg push DIR REPO

Notable:
- what is published is an allow-list of names, in one commit: see `hf_saereg/layout.py`
- a token is no option, because a command line is seen by other users and kept by the shell
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_saereg.cards import publish
from hf_saereg.errors import UserError
from hf_saereg.hub import PushArguments, PushOptions
from hf_saereg.options import parse_options


@dataclass
class PushedArguments:
    """What goes where; how is `PushOptions`."""

    folder: str = field(metadata={"help": "What save_pretrained or a trainer wrote."})
    repo: str = field(
        metadata={"help": "user/name, or name in your own namespace; made if it does not exist."}
    )


def main(words: Sequence[str]) -> None:
    """Publish the folder and print the commit's address.

    Raises:
        UserError: if the folder may not be published, or the Hub cannot be reached or refuses.
    """
    if any(word.partition("=")[0] == "--token" for word in words):
        raise UserError(
            "A token is no option of `saereg push`, because command lines are kept and seen by "
            "others; log in with `hf auth login`, or set HF_TOKEN."
        )
    pushed, options = parse_options(PushedArguments, PushOptions, arguments=words)
    folder = Path(pushed.folder).expanduser()
    commit = publish(folder, pushed.repo, PushArguments(**asdict(options)))
    print(f"Published {folder} as {commit.pr_url or commit.commit_url}")
