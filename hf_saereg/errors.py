"""Errors that a user can mend: a recipe prints their one sentence instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something asked for cannot be done; the message says what, and how to mend it."""


def in_one_line(error: Exception) -> str:
    """What an error says, without its line breaks, to be quoted in a sentence."""
    return " ".join(str(error).split())


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the program with the sentence of a `UserError` and exit code 1."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
