"""Code blocks of Markdown, and a process that runs Python blocks as they stand.

    python tests/snippets.py BLOCKS.json OUTPUTS.json [blocked module …]

Every block gets a namespace of its own, as if it were a program; they share the imported modules,
because importing them takes longer than all else.
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

from launching import run_python


def blocks(text, kinds="bash|python"):
    """(kind, code) of every fenced block, in order."""
    return re.findall(rf"```({kinds})\n(.*?)```", text, re.DOTALL)


def run_snippets(codes, folder, blocked=(), **options):
    """What each block printed, all run in one process.

    Args:
        codes: of the blocks.
        folder: that they run in.
        blocked: modules that they must do without.
        **options: of `run_python`.
    """
    given, outputs = folder / "snippets.json", folder / "outputs.json"
    given.write_text(json.dumps(codes))
    run_python(__file__, given, outputs, *blocked, folder=folder, **options)
    return json.loads(outputs.read_text())


def output_of(code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, code, "exec"), {"__name__": "__main__"})
    return printed.getvalue()


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(sys.argv[3:]))  # importing them fails from here on
    codes = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([output_of(code) for code in codes]))
