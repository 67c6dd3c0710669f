"""The command `saereg`, in this process."""

from hf_saereg import cli


def saereg(*words):
    """Run it; its one sentence where it ends in an error, else None."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as end:
        return str(end.code)
