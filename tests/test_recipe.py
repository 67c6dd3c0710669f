"""The character recipe, as users start it: what it leaves, what it survives, what it refuses."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from tiny_recipe import configuration
from training_job import lose_a_weight, weights
from transformers import AutoTokenizer, GPT2LMHeadModel

from hf_saereg import character
from hf_saereg.checkpoint import CheckpointError
from hf_saereg.errors import one_sentence_errors
from hf_saereg.heads import FAMILIES
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.resuming import SESSION_FILE
from hf_saereg.run_folder import write_run

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "recipes" / "train_character.py"
NAMES = ("plain", "regularized")
SITES = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]


def start(config, *words, processes="single"):
    accelerate = REPOSITORY / "recipes" / "accelerate" / f"{processes}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate]
    return subprocess.Popen(
        [*map(str, [*launch, RECIPE, "--config", config]), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(config.parent / "cache")},
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    code, output, errors = finish(start(configuration(folder)))
    assert code == 0, errors
    return folder, output


# ---- what it leaves ----


@pytest.mark.slow
def test_the_last_line_names_the_page_to_open(finished):
    folder, output = finished
    page = folder / "run" / "index.html"
    assert output.strip().splitlines()[-1] == f"Open {page}"
    assert page.read_text().lstrip().lower().startswith("<!doctype html")


@pytest.mark.slow
@pytest.mark.parametrize("name, sites", [("plain", []), ("regularized", SITES)])
def test_each_model_is_a_stock_checkpoint_with_its_heads_beside_it(finished, name, sites):
    folder = finished[0] / "run" / name
    _, loading = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys"))
    assert SAERegGPT2LMHeadModel.from_pretrained(folder).heads.hook_names == sites
    assert AutoTokenizer.from_pretrained(folder).decode([72, 105]) == "Hi"
    record = json.loads((folder / "run.json").read_text())
    assert record["options"]["n_embd"] == 16 and record["figures"]["steps"] == 30
    checkpoints = {path.name for path in folder.glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-25", "checkpoint-30"}
    assert list(folder.glob("runs/*/events*"))
    assert not list(finished[0].rglob("training_args.bin"))
    for config in folder.glob("saes/*/cfg.json"):
        metadata = json.loads(config.read_text())["metadata"]
        assert metadata["model_name"] == name and metadata["dataset_path"].endswith("text.txt")


@pytest.mark.slow
def test_fresh_heads_lie_in_folders_by_model_and_cell(finished):
    for name in ("plain", "regularized"):
        folder = finished[0] / "run" / "fresh" / name / "saes"
        cells = {path.name for path in folder.iterdir()}
        assert cells == {f"{cell}_d32_s3" for cell in ("topk_k2", "topk_k4", "standard_c1")}
        for cell in cells:
            assert {path.name for path in (folder / cell / "saes").iterdir()} == set(SITES)


@pytest.mark.slow
def test_results_have_the_documented_keys(finished):
    results = json.loads((finished[0] / "run" / "results.json").read_text())
    keys = {"models", "sites", "rows", "compound", "baselines", "seconds", "setup"}
    assert results.keys() == keys
    assert results["sites"] == SITES
    assert results["models"].keys() == {"plain", "regularized"}
    for figures in results["models"].values():
        asked = {"eval_ce", "train_ce", "tokens_per_second", "train_seconds", "eval_objective"}
        assert asked <= figures.keys() and all(figures[name] > 0 for name in asked)
    phases = {f"{phase}_{name}" for phase in ("train", "fresh", "fidelity") for name in NAMES}
    assert results["seconds"].keys() == phases
    labels = {"model", "family", "source", "sparsity", "d_sae", "seed"}
    ce = {"ce", "clean_ce", "mean_ablated_ce", "zero_ablated_ce", "kl", "ce_increase"}
    ce |= {"ce_recovered", "ce_recovered_from_zero", "ce_increase_at_half"}
    of_a_site = {"l0", "fvu", "explained_variance", "dead_fraction", "x_norm", "density_histogram"}
    for row in results["rows"]:
        assert row.keys() == {*labels, *ce, *of_a_site, "site"}
    for row in results["compound"]:
        assert row.keys() == {*labels, *ce, "sum_l0"}
    fresh = {("topk", "fresh", 2), ("topk", "fresh", 4), ("standard", "fresh", 1.0)}
    expected = {("plain", *cell) for cell in fresh} | {("regularized", *cell) for cell in fresh}
    expected |= {("regularized", "standard", "cotrained", 0.01)}
    for table, sites in ((results["rows"], 2), (results["compound"], 1)):
        cells = [(r["model"], r["family"], r["source"], r["sparsity"]) for r in table]
        assert set(cells) == expected and len(cells) == sites * len(expected)


@pytest.mark.slow
def test_both_models_log_their_norms_at_the_same_steps(finished):
    logged = []
    for name in NAMES:
        state = json.loads((finished[0] / "run" / name / "trainer_state.json").read_text())
        own = {
            log["step"]: {key for key in log if key.startswith("x_norm/")}
            for log in state["log_history"]
            if "loss" in log
        }
        assert all(keys == {f"x_norm/{site}" for site in SITES} for keys in own.values())
        logged.append(own.keys())
    assert logged[0] == logged[1] and len(logged[0]) > 1
    page = (finished[0] / "run" / "index.html").read_text()
    assert "Dashed: at the end of training" not in page


@pytest.mark.slow
def test_the_recipe_runs_on_two_processes(tmp_path):
    config = configuration(tmp_path, per_device_train_batch_size=2, max_steps=10)
    code, output, errors = finish(start(config, processes="cpu_2"))
    assert code == 0, errors
    assert output.count("Open ") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["setup"]["tokens_per_step"] == 4 * 32
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2


# ---- what it survives ----


@pytest.mark.slow
def test_a_run_killed_in_each_model_ends_with_the_weights_of_an_uninterrupted_one(
    finished, tmp_path
):
    config = configuration(tmp_path)
    for name, words in (("plain", []), ("regularized", ["--resume_from_checkpoint", "true"])):
        process = start(config, *words)
        first = tmp_path / "run" / name / "checkpoint-5" / "trainer_state.json"
        while not first.exists():
            assert process.poll() is None, finish(process)
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        record = json.loads((tmp_path / "run" / name / "run.json").read_text())
        assert record["figures"] is None, "killed too late to show anything"
        assert not (tmp_path / "run" / name / "checkpoint-30").exists()
    code, output, errors = finish(start(config, "--resume_from_checkpoint", "true"))
    assert code == 0, errors
    assert output.strip().splitlines()[-1].endswith("index.html")
    for name in NAMES:
        assert_equal(weights(tmp_path / "run" / name), weights(finished[0] / "run" / name))
    results = [
        json.loads((folder / "run" / "results.json").read_text())
        for folder in (tmp_path, finished[0])
    ]
    assert results[0]["rows"] == results[1]["rows"]
    assert results[0]["compound"] == results[1]["compound"]


def test_a_finished_model_that_lost_a_weight_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    job = character.CharacterJob.from_options(["--config", str(configuration(tmp_path))])
    folder = tmp_path / "run" / "plain"
    job.new_model("plain").save_pretrained(folder)
    write_run(folder, job.arguments, job.options, {"wall_seconds": 1.0})
    assert job.train("plain")[1] == {"wall_seconds": 1.0}
    lose_a_weight(folder, "transformer.ln_f.bias")
    with pytest.raises(CheckpointError, match=r"lacks weights, transformer\.ln_f\.bias"):
        job.train("plain")


# ---- in this process, for speed ----


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """The recipe's module; call it with words of the command line."""
    spec = importlib.util.spec_from_file_location("train_character", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, words)])
        with one_sentence_errors():
            module.main()

    call.module = module
    return call


def test_twins_start_alike_and_read_the_same_blocks_in_the_same_order(
    recipe, tmp_path, monkeypatch
):
    seen = {}

    class Watched(character.SAERegTrainer):
        def train(self, *args, **kwargs):
            self.mine = seen[Path(self.args.output_dir).name] = {"batches": []}
            state = self.model.plain_view().state_dict()
            self.mine["start"] = {name: tensor.clone() for name, tensor in state.items()}
            return super().train(*args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            self.mine["batches"].append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(character, "SAERegTrainer", Watched)
    recipe("--config", configuration(tmp_path, max_steps=8))
    plain, regularized = seen["plain"], seen["regularized"]
    assert_equal(plain["start"], regularized["start"])
    assert len(plain["batches"]) == len(regularized["batches"]) == 8
    assert all(map(torch.equal, plain["batches"], regularized["batches"]))
    ends = [weights(tmp_path / "run" / name)["transformer.wte.weight"] for name in NAMES]
    assert not torch.equal(*ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_regularizes_and_is_fitted_by_its_name_alone(recipe, tmp_path, family):
    few = {"max_steps": 2, "fresh_steps": 2, "fresh_k": [2], "fresh_target_l0": [2.0]}
    few |= {"sparsity_coefficient": None, "target_l0": [4]}
    recipe(
        "--config",
        configuration(tmp_path, architecture=family, **few | {"fresh_architectures": [family]}),
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    seen = {(row["model"], row["family"], row["source"], row["site"]) for row in results["rows"]}
    own = {("regularized", family, "cotrained", site) for site in SITES}
    assert seen == own | {(name, family, "fresh", site) for name in NAMES for site in SITES}


def test_a_training_by_epochs_tells_its_steps(recipe, tmp_path):
    own = {"max_steps": -1, "num_train_epochs": 1, "max_characters": 4000, "fresh_steps": 2}
    recipe("--config", configuration(tmp_path, **own))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    tokens = results["setup"]["train_tokens"]
    steps = tokens // (4 * 32)  # `dataloader_drop_last`
    assert results["setup"]["steps"] == steps == results["models"]["regularized"]["steps"] > 1
    page = (tmp_path / "run" / "index.html").read_text()
    passes = steps * 4 * 32 / tokens
    assert f"({steps} steps of 128 tokens,\n{passes:.1f} passes over the text)" in page


def test_a_second_call_adds_its_time_to_that_of_the_first(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.module, "write_report", lambda results, folder: folder)  # slow
    config = configuration(tmp_path, max_steps=2, fresh_steps=2, save_steps=1)
    recipe("--config", config)
    run = tmp_path / "run"
    first = json.loads((run / "run.json").read_text())["wall_seconds"]
    trainings = [json.loads((run / name / "run.json").read_text()) for name in NAMES]
    assert first > sum(training["wall_seconds"] for training in trainings) > 0
    recipe("--config", config, "--resume_from_checkpoint", "true")
    record = json.loads((run / "run.json").read_text())
    assert first < record["wall_seconds"] == record["figures"]["wall_seconds"]
    # one training finished before, the other cut off after its first checkpoint
    for folder, seconds in ((run, None), (run / "plain", 1000.0), (run / "regularized", None)):
        record = json.loads((folder / "run.json").read_text())
        record |= {"wall_seconds": seconds, "figures": record["figures"] if seconds else None}
        if seconds:
            record["figures"]["wall_seconds"] = seconds
        (folder / "run.json").write_text(json.dumps(record))
    shutil.rmtree(run / "regularized" / "checkpoint-2")
    session = run / "regularized" / "checkpoint-1" / SESSION_FILE
    session.write_text(json.dumps({"train_seconds": 100.0, "wall_seconds": 200.0}))
    recipe("--config", config, "--resume_from_checkpoint", "true")
    last, regularized = (
        json.loads((folder / "run.json").read_text())["wall_seconds"]
        for folder in (run, run / "regularized")
    )
    assert 200 < regularized < 300 and 1200 < last < 1400 and last - 1000 > regularized


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder as a run leaves it, in which the checks look only at `run.json`."""
    folder = tmp_path_factory.mktemp("left")
    spec = importlib.util.spec_from_file_location("train_character", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(sys, "argv", [str(RECIPE), "--config", str(configuration(folder))])
        # as if killed before the first step
        patch.setattr(character.CharacterJob, "train", lambda *args: sys.exit(0))
        with pytest.raises(SystemExit):
            module.main()
    return folder


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "already holds this run; add --resume_from_checkpoint true"),
        (["--seed", "4"], "holds another run (seed was 3, now 4)"),
        (["--resume_from_checkpoint", "true", "--d_sae", "64"], "d_sae was [48], now [64]"),
        (["--resume_from_checkpoint", "checkpoint-5"], "say true or false"),
    ],
)
def test_what_lies_in_the_folder_is_not_overwritten(recipe, left, words, sentence):
    before = snapshot(left / "run")
    assert before
    with pytest.raises(SystemExit) as ended:
        recipe("--config", left / "tiny.yaml", *words)
    assert ended.value.code.startswith("error: ") and sentence in ended.value.code
    assert snapshot(left / "run") == before


BAD = {
    "hook_names": (["blocks.7.hook_resid_pre"], "Unknown hook name 'blocks.7.hook_resid_pre'"),
    "d_sae": ([8, 8, 8], "d_sae has 3 values for 2 sites"),
    "d_sae 0": ([0], "d_sae at blocks.0.hook_resid_pre is 0"),
    "reconstruction_weight": ([-1.0], "reconstruction_weight at blocks.0.hook_resid_pre is -1.0"),
    "reconstruction_weight nan": ([float("nan")], "must be a finite number"),
    "architecture": ("relu", "Unknown architecture 'relu'"),
    "fresh_architectures": (["relu"], "Unknown architecture 'relu'"),
    "fresh_k": ([2, 33], "needs 1 ≤ k ≤ d_sae (32)"),
    "fresh_steps": (0, "fresh_steps is 0"),
    "dataset": ("missing.txt", "The file 'missing.txt' does not exist"),
    "block_size": (100_000, "each split needs at least one block"),
    "block_size 1": (1, "block_size is 1"),
    "max_stesp": (3, "did you mean 'max_steps'"),
    "max_steps": ("many", "invalid int value: 'many'"),
    "kernel": ("fast", "Unknown kernel 'fast'"),
    "dropout": (1.5, "dropout is 1.5; it must be from 0 to below 1"),
    "report_to": ("tensorbord", "report_to names 'tensorbord'; choose from"),
    "learning_rate": (-1.0, "learning_rate is -1.0; it must be a finite number ≥ 0"),
    "learning_rate nan": (float("nan"), "learning_rate is nan"),
}


def assert_refused(recipe, folder, sentence, *words, **changes):
    """One sentence, a failure, and nothing written."""
    config = configuration(folder, **changes)
    with pytest.raises(SystemExit) as ended:
        recipe("--config", config, *words)
    message = ended.value.code
    assert isinstance(message, str), message  # printed by Python, with exit code 1
    assert message.startswith("error: ") and sentence in message
    assert "\n" not in message
    assert not (folder / "run").exists()


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_one_sentence_and_leaves_nothing(recipe, tmp_path, option):
    value, sentence = BAD[option]
    assert_refused(recipe, tmp_path, sentence, **{option.split()[0]: value})


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_what_the_page_needs_is_sought_before_anything_is_trained(
    recipe, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    sentence = f"The report needs {name}: run `pip install 'hf-saereg[report]'`"
    assert_refused(recipe, tmp_path, sentence)


def test_more_latents_a_token_than_there_are_is_refused(recipe, tmp_path):
    own = {"architecture": "topk", "sparsity_coefficient": None, "k": [49]}
    assert_refused(recipe, tmp_path, "needs 1 ≤ k ≤ d_sae (48)", **own)


def test_topk_heads_without_k_are_refused(recipe, tmp_path):
    sentence = "how sparse the topk heads shall be; give target_l0 or k"
    assert_refused(recipe, tmp_path, sentence, architecture="topk", sparsity_coefficient=None)


def test_another_family_than_that_of_the_file_does_not_read_its_coefficient(recipe, tmp_path):
    sentence = "topk heads do not read sparsity_coefficient; take it out, of the YAML file too"
    assert_refused(recipe, tmp_path, sentence, "--architecture", "topk", "--target_l0", "4")


def test_a_misspelt_word_of_the_command_line_is_refused(recipe, tmp_path):
    sentence = "Unknown option 'fresh_stesp' in the command line; did you mean 'fresh_steps'?"
    assert_refused(recipe, tmp_path, sentence, "--fresh_stesp", "4")


@pytest.mark.parametrize(
    "text, sentence",
    [
        (b"", "is empty"),
        (b"caf\xe9" * 99, "is not UTF-8 at byte 3"),
        (b"short", "gives 0 training"),
    ],
)
def test_a_text_that_cannot_be_cut_is_refused(recipe, tmp_path, text, sentence):
    (tmp_path / "other.txt").write_bytes(text)
    assert_refused(recipe, tmp_path, sentence, dataset=str(tmp_path / "other.txt"))


def test_a_text_of_less_than_a_batch_is_refused(recipe, tmp_path):
    sentence = "fewer than the 500 of one batch over 1 process(es), and dataloader_drop_last"
    assert_refused(recipe, tmp_path, sentence, per_device_train_batch_size=500)


def test_a_folder_of_other_files_is_refused(recipe, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    before = snapshot(tmp_path / "thesis")
    words = ["--output_dir", str(tmp_path / "thesis")]
    assert_refused(recipe, tmp_path, "is not empty and holds no run.json", *words)
    assert snapshot(tmp_path / "thesis") == before


@pytest.mark.slow
def test_launched_too_an_error_is_one_sentence_and_a_failure(tmp_path):
    own = {"architecture": "topk", "sparsity_coefficient": None, "k": [0]}
    code, output, errors = finish(start(configuration(tmp_path, **own)))
    assert code != 0 and "Traceback" not in errors.partition("error: ")[0]
    assert "error: k at blocks.0.hook_resid_pre is 0; a topk head needs" in errors
    assert not (tmp_path / "run").exists() and "Open" not in output
