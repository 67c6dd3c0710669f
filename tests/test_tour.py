"""The tour, block by block as it stands: a clean environment, and a Hub on this machine."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from checkouts import copy_checkout
from conftest import REPOSITORY
from loopback_hub import LoopbackHub
from snippets import blocks

NEEDED = {"sae_lens": "sae-lens", "transformer_lens": "transformer-lens"}


@pytest.fixture
def clean_environment(tmp_path):
    """A virtual environment with all that we depend on, but not us; returns its bin folder."""
    installed = tmp_path / "installed"
    installed.mkdir()
    folders = [Path(sysconfig.get_paths()["purelib"])]
    folders += [Path(path) for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    for folder in folders:
        if folder == REPOSITORY:
            continue
        for path in folder.iterdir():
            ours = path.name.startswith(("hf_saereg", "__editable__", "_virtualenv", "pip"))
            if not ours and not (installed / path.name).exists():
                (installed / path.name).symlink_to(path)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "installed.pth").write_text(str(installed))
    return venv / "bin"


@pytest.mark.slow
def test_every_block_of_the_tour_runs_as_it_stands(clean_environment, tmp_path):
    folder = copy_checkout(tmp_path / "checkout")
    shutil.move(folder / "hf_saereg", folder / "source")  # so that only the wheel is imported
    skipped, outputs = [], []
    with LoopbackHub() as hub:
        environment = os.environ | hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{clean_environment}:{environment['PATH']}"
        environment.pop("PYTHONPATH", None)
        for kind, code in blocks((REPOSITORY / "recipes" / "tour.md").read_text()):
            absent = [package for module, package in NEEDED.items()
                      if module in code and importlib.util.find_spec(module) is None]  # fmt: skip
            if absent:
                skipped += absent
                continue
            if kind == "bash":
                (folder / "source").rename(folder / "hf_saereg")
                command = ["bash", "-euc", code]
            else:
                command = ["python", "-c", code]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            outputs.append(done.stdout)
            if kind == "bash":
                (folder / "hf_saereg").rename(folder / "source")
        published = hub.files("your-name/tour").keys()
    assert {"config.json", "README.md", "saes/blocks.1.hook_resid_pre/cfg.json"} <= published
    l0 = re.search(r"'eval_l0/blocks.1.hook_resid_pre': ([\d.]+)", outputs[1])
    assert 0 < float(l0[1]) <= 8
    assert outputs[2].startswith(hub.endpoint)
    assert "blocks.1.hook_resid_pre" in outputs[3]
    if skipped:
        pytest.skip(f"{', '.join(dict.fromkeys(skipped))} not installed; the other blocks did run")
    assert outputs[4].splitlines()[0].startswith("'T' [")
    assert re.search(r"CE \d\.\d+, with the reconstruction in place \d\.\d+", outputs[5])
