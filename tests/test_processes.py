"""Processes that were launched together must know of each other."""

from types import SimpleNamespace

import pytest

from hf_saereg import processes


def test_a_process_that_was_launched_with_others_but_is_alone_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(processes.ProcessesError, match=r"2 processes.*joined to 1;.*--use_cpu"):
        processes.start_accelerator()


def test_a_single_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.start_accelerator(use_cpu=True).num_processes == 1
