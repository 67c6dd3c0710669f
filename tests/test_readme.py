"""The README, block by block as it stands, in a copy of the checkout and against a Hub here.

What is smaller than a reader's: the configuration of the demo is cut to a few steps of a short
text, `saereg sweep`, `features` and `quality` get options appended that do the same, and
`make test` runs one file.
"""

import os
import subprocess
import sys

import pytest
import yaml
from checkouts import copy_checkout
from conftest import REPOSITORY
from loopback_hub import LoopbackHub
from snippets import blocks, run_snippets

SITE = "blocks.2.hook_resid_pre"
SHORT = {"max_steps": 3, "max_characters": 30_000, "fidelity_blocks": 2}
SHORT_DEMO = {
    **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "save_steps": 3},
    **{"warmup_steps": 1, "fresh_steps": 2, "fresh_batch_size": 2},
}
APPENDED = {
    "sweep": "--max_steps 2 --warmup_steps 1 --batch_size 1 --fidelity_blocks 1 "
    "--max_characters 30000",
    "features": "--max_characters 30000 --blocks 4 --max_features 20",
    "quality": "--max_characters 30000 --blocks 4",
}


def appended(command):
    cases = "".join(f'  {name}) set -- "$@" {words} ;;\n' for name, words in APPENDED.items())
    return f'case "$1" in\n{cases}esac\n{command}'


@pytest.fixture
def checkout(tmp_path):
    """A clone whose `.venv` is there already: this interpreter's packages, the clone's sources."""
    folder = copy_checkout(tmp_path / "checkout")
    demo = folder / "recipes" / "character_demo.yaml"
    options = yaml.safe_load(demo.read_text())
    demo.write_text(yaml.safe_dump(options | SHORT | SHORT_DEMO))
    scripts = folder / ".venv" / "bin"
    scripts.mkdir(parents=True)
    python = f'exec {sys.executable} "$@"'
    launch = "accelerate.commands.accelerate_cli"
    for name, command in {
        "python": python,
        "accelerate": python.replace('"$@"', f'-m {launch} "$@"'),
        "saereg": appended(python.replace('"$@"', '-m hf_saereg.cli "$@"')),
    }.items():
        (scripts / name).write_text(f"#!/bin/sh\n{command}\n")
        (scripts / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    return folder


def shell(code, folder, **variables):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | variables
    environment["PATH"] = f"{folder / '.venv' / 'bin'}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_block_of_the_readme_runs_as_it_stands(checkout, tmp_path):
    pytest.importorskip("sae_lens", reason="the README needs the extra [interop]")
    pytest.importorskip("transformer_lens", reason="the README needs the extra [interop]")
    pytest.importorskip("scipy", reason="the README needs the extra [quality]")
    text = (REPOSITORY / "README.md").read_text()
    commands = [code for _, code in blocks(text, "bash")]
    programs = [code for _, code in blocks(text, "python")]
    assert text.count("```") == 2 * (len(commands) + len(programs))  # no block of another kind
    with LoopbackHub() as hub:
        variables = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(checkout)}
        variables |= {"PYTEST_ADDOPTS": "tests/test_options.py"}  # in place of them all
        variables |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        printed = [shell(code, checkout, **variables) for code in commands]
        ours = [code for code in programs if "hf_saereg" in code]
        theirs = [code for code in programs if "hf_saereg" not in code]
        spoken, *_ = run_snippets(theirs, checkout, blocked=["hf_saereg"], **variables)
        run_snippets(ours, checkout, **variables)
        published = hub.files("user/name").keys()
    assert {"config.json", "README.md", f"saes/{SITE}/cfg.json"} <= published
    assert spoken.startswith("ROMEO:\n")
    assert "passed" in printed[0]
    runs = checkout / "runs"
    assert (runs / "mine" / "index.html").read_text() != (runs / "demo" / "index.html").read_text()
    for page in ("report", "features", "both"):
        assert (runs / page / "index.html").is_file()
    assert 'id="quality"' in (runs / "report" / "index.html").read_text()
    assert any(said.startswith("Published runs/demo/regularized as ") for said in printed)
