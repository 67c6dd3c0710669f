"""Copies of this checkout, for tests that work in one."""

import shutil

from launching import REPOSITORY

NOT_SOURCE = (".*", "runs", "results", "build", "dist", "*.egg-info", "__pycache__")


def copy_checkout(folder):
    """The files that are in a fresh clone; returns the folder."""
    return shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))
