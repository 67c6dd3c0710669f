"""`saereg compare` killed with SIGKILL in the middle of a training, and called again."""

import json
import os
import signal
import time

import pytest
import yaml
from tiny_recipe import configuration

from hf_saereg.commands.compare import main

pytestmark = pytest.mark.slow
VARIANTS = {"plain": {"model": "plain"}, "topk": {"architecture": "topk", "k": [3]}}
TIMED = ("costs",)  # of `study.json`
WAIT = 300  # seconds


def figures_of(folder):
    """`study.json` without what a clock measured."""
    content = json.loads((folder / "study.json").read_text())
    for row in content["rows"]:
        del row["relative_time"]
    return {name: value for name, value in content.items() if name not in TIMED}


def killed_during(words, is_under_way):
    """Run the command in a child, and kill it once a condition holds; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            main(words)
        finally:
            os._exit(0)
    end = time.monotonic() + WAIT
    while not is_under_way() and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_killed_comparison_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = {"sparsity_coefficient": None, "target_l0": [6.0]}
    base = configuration(tmp_path, fresh_architectures=["topk"], **own)
    content = {"base": base.name, "seeds": [0, 1], "variants": VARIANTS}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ["--study", str(tmp_path / "study.yaml"), "--output_dir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main([*words, str(whole)])
    own = killed / "topk" / "seed_0"
    assert killed_during([*words, str(killed)], lambda: any(own.glob("**/trainer_state.json")))
    assert (killed / "plain" / "seed_0" / "cell.json").is_file()
    assert not (own / "cell.json").exists() and not (killed / "study.json").exists()
    main([*words, str(killed)])
    assert figures_of(killed) == figures_of(whole)
    assert (killed / "index.html").is_file()
