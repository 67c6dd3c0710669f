"""`saereg sweep`: results and heads of a stock checkpoint, kill and resume, two processes."""

import configparser
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch
from launching import REPOSITORY, launch_two
from saereg_command import saereg
from safetensors.torch import load_file
from tiny_checkpoint import SITES, save_stock_model, write_text

from hf_saereg import cli
from hf_saereg.commands.sweep import SweepArguments
from hf_saereg.commands.text import TextArguments
from hf_saereg.errors import UserError
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.fresh import fidelity_batches
from hf_saereg.heads import HeadConfigError, SAEHeadConfig
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.folder import load_head
from hf_saereg.loading import load_checkpoint
from hf_saereg.options import parse_options
from hf_saereg.sweep import SharedTraining

OPTIONS = {
    "target_l0": [2, 6],
    "d_sae": [24],
    "max_steps": 8,
    "batch_size": 2,
    "warmup_steps": 1,
    "fidelity_blocks": 4,
    "save_steps": 2,
    "use_cpu": "true",
}
CELLS = {"topk_k2_d24_s0", "topk_k6_d24_s0", "standard_l2_d24_s0", "standard_l6_d24_s0"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a stock checkpoint and a text."""
    folder = tmp_path_factory.mktemp("given")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    save_stock_model(folder / "model")
    write_text(folder / "text.txt")
    return folder


def words(given, output_dir, **changes):
    options = OPTIONS | {"dataset": given / "text.txt", "output_dir": output_dir} | changes
    flags = [
        word
        for name, value in options.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]
    return ["sweep", str(changes.pop("model", given / "model")), *flags]


@pytest.fixture(scope="module")
def swept(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    assert saereg(*words(given, folder)) is None
    return folder


def heads_of(folder):
    return {
        path.relative_to(folder): load_file(path)
        for path in sorted(folder.glob("saes/**/*.safetensors"))
    }


def assert_same_heads(folder, expected):
    ours, theirs = heads_of(folder), heads_of(expected)
    assert ours.keys() == theirs.keys() and ours
    for path, tensors in theirs.items():
        assert all(torch.equal(ours[path][name], tensor) for name, tensor in tensors.items()), path


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def numbers(rows):
    return [value for row in rows for value in row.values() if isinstance(value, float)]


def test_what_is_skipped_is_kept_with_the_heads_and_read_again(given, tmp_path):
    pytest.importorskip("scipy")
    own = {"families": "topk", "target_l0": 2, "max_steps": 2, "skip_positions": 1}
    run, end = tmp_path / "run", ord("g")
    skip = {"skip_positions": 1, "skip_tokens": [end]}
    assert saereg(*words(given, run, **own, skip_tokens=end)) is None
    head = load_head(run / "saes" / "topk_k2_d24_s0", SITES[0])
    assert dataclasses.asdict(head.config.skip) == skip
    assert skip.items() <= results_of(run)["setup"].items()
    others = words(given, run, **own, skip_tokens=end + 1)
    assert "skip_tokens was [103], now [104]" in saereg(*others)

    text = ("--dataset", given / "text.txt", "--use_cpu", "true", "--blocks", 4)
    assert saereg("quality", run, *text) is None
    model, tokenizer = load_checkpoint(str(given / "model"))
    blocks = TextArguments(dataset=str(given / "text.txt")).blocks(model.config, tokenizer)
    read = sum(
        token != end for block in blocks["validation"][:4]["input_ids"] for token in block[1:]
    )
    assert json.loads((run / "quality.json").read_text())["setup"]["tokens"] == {"model": read}
    features = ["features", given / "model", "--hook_name", SITES[0], *text]
    features += ["--saes", run / "saes" / "topk_k2_d24_s0", "--output_dir", tmp_path / "page"]
    assert "trained with skip_positions 1" in saereg(*features, "--skip_positions", 3)
    assert saereg(*features) is None
    assert f"{read:,} tokens" in (tmp_path / "page" / "index.html").read_text()


def test_the_ce_of_the_scored_blocks_is_not_called_validation_ce(swept):
    results = results_of(swept)
    assert results["models"].keys() == {"model"}
    assert results["models"]["model"].keys() == {"parameters"}
    assert results["baselines"]["model"]["clean_ce"] == results["compound"][0]["clean_ce"] > 0
    told = {"fresh_steps": 8, "fresh_batch_size": 2, "fresh_warmup_steps": 1}
    assert told.items() <= results["setup"].items()
    assert not {"steps", "tokens_per_step"} & results["setup"].keys()


def test_every_cell_is_scored_and_its_heads_are_kept(swept):
    assert {path.name for path in (swept / "saes").iterdir()} == CELLS
    results = results_of(swept)
    assert results["sites"] == SITES
    labels = {"model", "family", "source", "sparsity", "d_sae", "seed"}
    ce = {"ce", "clean_ce", "mean_ablated_ce", "zero_ablated_ce", "kl", "ce_increase"}
    ce |= {"ce_recovered", "ce_recovered_from_zero", "ce_increase_at_half"}
    for row in results["compound"]:
        assert row.keys() == {*labels, *ce, "sum_l0"}
        assert (row["model"], row["d_sae"], row["seed"]) == ("model", 24, 0)
    for row in results["rows"]:
        assert {*labels, *ce, "site", "l0", "fvu", "dead_fraction"} <= row.keys()
    asked = [(f, s) for f in ("topk", "standard") for s in (2, 6)]
    assert [(row["family"], row["sparsity"]) for row in results["compound"]] == asked
    assert len(results["rows"]) == len(asked) * len(SITES)
    assert all(map(math.isfinite, numbers(results["rows"] + results["compound"])))
    assert not list((swept / "unfinished").iterdir())


def test_scores_are_those_of_the_saved_heads(given, swept):
    model, tokenizer = load_checkpoint(str(given / "model"))
    text = TextArguments(dataset=str(given / "text.txt"))
    blocks = text.blocks(model.config, tokenizer)
    batches = fidelity_batches(blocks["validation"], 4, model.config)
    base = baselines(model, batches)
    folder = swept / "saes" / "topk_k6_d24_s0"
    heads = HeadBank(load_head(folder, hook_name) for hook_name in SITES).eval()
    scores = fidelity(model, heads, batches, base)
    (compound,) = (
        row
        for row in results_of(swept)["compound"]
        if (row["family"], row["sparsity"]) == ("topk", 6)
    )
    assert compound["ce_increase"] == pytest.approx(scores.compound.ce_increase, rel=1e-5)
    assert compound["kl"] == pytest.approx(scores.compound.kl, rel=1e-5)
    assert compound["sum_l0"] == pytest.approx(scores.compound_l0)


def test_called_again_it_trains_nothing(given, swept, monkeypatch, capsys):
    def refuse(*_args, **_options):
        raise AssertionError("a finished sweep was trained again")

    monkeypatch.setattr(SharedTraining, "of", refuse)
    before = results_of(swept)
    assert saereg(*words(given, swept)) is None
    assert results_of(swept)["rows"] == before["rows"]
    assert "saereg report" in capsys.readouterr().out


class KilledError(RuntimeError):
    pass


def kill_after(monkeypatch, number):
    """Let every call of a method pass, up to a number of them."""
    calls = []
    train = SharedTraining.finished

    def finished(self, training):
        calls.append(training.cell)
        if len(calls) > number:
            raise KilledError
        return train(self, training)

    monkeypatch.setattr(SharedTraining, "finished", finished)
    return calls


def test_a_sweep_killed_while_it_scored_goes_on_with_the_rest(given, swept, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(KilledError):
            saereg(*words(given, tmp_path / "out"))
    finished = list((tmp_path / "out" / "cells").glob("*.json"))
    assert len(finished) == 1
    stamp = finished[0].stat().st_mtime_ns
    with monkeypatch.context() as patch:
        calls = kill_after(patch, 99)
        assert saereg(*words(given, tmp_path / "out")) is None
        assert len(calls) == 3
    assert finished[0].stat().st_mtime_ns == stamp
    assert_same_heads(tmp_path / "out", swept)
    assert results_of(tmp_path / "out")["rows"] == results_of(swept)["rows"]


def test_cells_trained_one_after_the_other_end_alike(given, swept, tmp_path):
    assert saereg(*words(given, tmp_path / "out", cells_at_once=3)) is None
    assert_same_heads(tmp_path / "out", swept)


def test_a_grid_may_grow(given, swept, tmp_path):
    """Cells at other steps of their training, trained together, end as if alone."""
    out = tmp_path / "out"
    assert saereg(*words(given, out, families="topk", target_l0=[2])) is None
    first = results_of(out)
    assert saereg(*words(given, out)) is None
    assert_same_heads(out, swept)
    grown = results_of(out)
    assert first["rows"] == grown["rows"][: len(SITES)]
    assert saereg(*words(given, out, families="topk", target_l0=[6])) is None
    assert len(results_of(out)["rows"]) == len(grown["rows"])  # nothing found before is lost


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"max_steps": 9}, "max_steps was 8, now 9"), ({"model": "other"}, "model_sha256")],
)
def test_another_sweep_does_not_go_on_in_the_folder(given, swept, tmp_path, changes, named):
    if "model" in changes:
        changes = {"model": save_stock_model(tmp_path / "model", seed=5)}
    before = results_of(swept)
    assert named in saereg(*words(given, swept, **changes))
    assert results_of(swept) == before


def test_seeds_and_sizes_are_cells_too(given, tmp_path):
    changes = {"families": "topk", "target_l0": [2], "d_sae": [16, 24], "seeds": [0, 1]}
    assert saereg(*words(given, tmp_path / "out", **changes, max_steps=2)) is None
    found = results_of(tmp_path / "out")["compound"]
    assert [(row["d_sae"], row["seed"]) for row in found] == [(16, 0), (24, 0), (16, 1), (24, 1)]
    assert len({row["ce_increase"] for row in found}) == 4


def test_a_models_own_heads_are_scored_beside(given, tmp_path):
    model, _ = load_checkpoint(str(given / "model"))
    model.attach_heads([SAEHeadConfig("topk", site, 16, 40, k=3) for site in SITES[:2]])
    model.save_pretrained(tmp_path / "model")
    changes = {"families": "topk", "target_l0": [2], "max_steps": 1, "model": tmp_path / "model"}
    assert saereg(*words(given, tmp_path / "out", **changes)) is None
    fresh, own = results_of(tmp_path / "out")["compound"]
    assert (fresh["source"], own["source"]) == ("fresh", "cotrained")
    assert (own["family"], own["sparsity"], own["d_sae"], own["seed"]) == ("topk", 3, 40, None)
    assert own["sum_l0"] <= 6 and own["mean_ablated_ce"] is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"families": ["topk", "gate"]}, "Unknown architecture 'gate'"),
        ({"target_l0": [50]}, "is 50"),
        ({"target_l0": [2.5]}, "whole number"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"d_sae": [-3]}, "d_sae"),
        ({"block_size": 64}, "context is 32"),
        ({"dataset": "./missing.txt"}, "missing.txt"),
        ({"model": "./missing"}, "neither a folder nor the name of a repository"),
        ({"target_10": [5]}, "did you mean 'target_l0'"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(given, tmp_path, changes, sentence):
    found = saereg(*words(given, tmp_path / "out", **changes))
    assert sentence in found and found.startswith("error: ") and "\n" not in found
    assert not (tmp_path / "out").exists()


def test_an_unknown_command_names_its_neighbour():
    assert "did you mean 'sweep'" in saereg("swep")


def test_the_command_is_installed():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    (line,) = setup["options.entry_points"]["console_scripts"].split("\n")[1:]
    module, _, function = line.removeprefix("saereg = ").partition(":")
    assert getattr(import_module(module), function) is cli.main


def test_help_lists_every_command(capsys):
    saereg("--help")
    listed = capsys.readouterr().out
    assert all(f"saereg {name}" in listed for name in cli.COMMANDS)


def test_options_come_from_a_file_too(tmp_path):
    (tmp_path / "sweep.yaml").write_text("seeds: [3, 4]\nmax_steps: 7\n")
    line = cli.with_subject(["model"], ["M", "--config", str(tmp_path / "sweep.yaml")])
    arguments, _ = parse_options(SweepArguments, TextArguments, arguments=line)
    assert (arguments.model, arguments.seeds, arguments.max_steps) == ("M", [3, 4], 7)


def test_an_empty_grid_is_refused():
    with pytest.raises(HeadConfigError, match="seeds is empty"):
        SweepArguments(model="M", seeds=[])


def test_blocks_fit_the_model(given):
    config = load_checkpoint(str(given / "model"))[0].config
    assert TextArguments().for_model(config).block_size == 32
    config.n_positions = 1024
    assert TextArguments().for_model(config).block_size == 128
    assert TextArguments(block_size=256).for_model(config).block_size == 256
    with pytest.raises(UserError, match="train_fraction"):
        TextArguments(train_fraction=2.0)


# ---- real processes ----


@pytest.mark.slow
def test_a_sweep_that_was_killed_outright_ends_with_the_same_heads(given, swept, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hf_saereg.cli", *words(given, out)]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    state = out / "unfinished" / "standard_l6_d24_s0.safetensors"
    deadline = time.monotonic() + 300
    while not state.is_file() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert state.is_file() and not list((out / "cells").glob("*.json"))
    assert saereg(*words(given, out)) is None
    assert_same_heads(out, swept)
    assert results_of(out)["rows"] == results_of(swept)["rows"]


@pytest.mark.slow
def test_two_processes_share_the_cells(given, swept, tmp_path):
    out = tmp_path / "out"
    launch_two("-m", "hf_saereg.cli", *words(given, out), timeout=300)
    assert json.loads((out / "run.json").read_text())["world_size"] == 2
    assert_same_heads(out, swept)
    ours, theirs = results_of(out), results_of(swept)
    assert numbers(ours["rows"]) == pytest.approx(numbers(theirs["rows"]), rel=1e-6, abs=1e-9)
    found, expected = (r["baselines"]["model"]["mean_ablated_ce"] for r in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-6)
