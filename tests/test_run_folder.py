"""A run's folder: whose it is, and what is never overwritten."""

import json
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from hf_saereg import run_folder
from hf_saereg.run_folder import (
    RUN_FILE,
    RunFolderError,
    check_run_folder,
    earlier_seconds,
    finished_figures,
    write_json,
    write_run,
)

OPTIONS = {"learning_rate": 1e-3, "d_sae": [8, 16], "resume_from_checkpoint": None}
CONTINUED = OPTIONS | {
    "resume_from_checkpoint": "true",
    "disable_tqdm": True,
    "report_to": ["wandb"],
}


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, seed=7, report_to="none")


@pytest.fixture
def folder(tmp_path, arguments):
    write_run(tmp_path / "run", arguments, OPTIONS)
    return tmp_path / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_or_empty_folder_is_free_and_left_as_it_is(tmp_path):
    check_run_folder(tmp_path / "absent", OPTIONS, resume=False)
    check_run_folder(tmp_path, OPTIONS, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_needs_resume(folder):
    before = contents(folder)
    with pytest.raises(RunFolderError, match="--resume_from_checkpoint true"):
        check_run_folder(folder, OPTIONS, resume=False)
    check_run_folder(folder, CONTINUED, resume=True)
    assert contents(folder) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001, now 0.002"),
        ({"d_sae": [8, 8]}, "d_sae was"),
        ({"new_option": 1}, "new_option was None, now 1"),
    ],
)
def test_another_run_is_refused_by_the_option_that_differs(folder, resume, change, named):
    with pytest.raises(RunFolderError, match=named):
        check_run_folder(folder, OPTIONS | change, resume=resume)


@pytest.mark.parametrize("off", [None, False, 0.0, []])
def test_an_option_that_came_later_and_is_off_leaves_the_run_the_same(folder, off):
    check_run_folder(folder, OPTIONS | {"new_option": off}, resume=True)


def test_a_run_goes_on_with_another_patience(tmp_path, arguments):
    write_run(tmp_path / "old", arguments, OPTIONS | {"ddp_timeout": 1800})
    check_run_folder(tmp_path / "old", OPTIONS | {"ddp_timeout": 2_592_000}, resume=True)


def test_a_tuple_is_the_list_that_json_makes_of_it(folder):
    check_run_folder(folder, OPTIONS | {"d_sae": (8, 16)}, resume=True)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"options": {"lea', r"run\.json cannot be read \(no valid JSON\)"),
        ("\x00", "no valid JSON"),
        ("", "no valid JSON"),
        ("[]", "not what a run of this package writes"),
        ('{"name": "another program"}', "not what a run of this package writes"),
        ('{"options": {}}', "not what a run of this package writes"),
    ],
)
def test_a_record_that_is_damaged_or_foreign_is_refused_in_one_sentence(folder, text, sentence):
    (folder / RUN_FILE).write_text(text)
    for read in (
        lambda: check_run_folder(folder, OPTIONS, resume=True),
        lambda: finished_figures(folder),
    ):
        with pytest.raises(RunFolderError, match=sentence) as caught:
            read()
        assert "\n" not in str(caught.value) and "output_dir" in str(caught.value)


def test_a_record_that_is_no_text_is_refused(folder):
    (folder / RUN_FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(RunFolderError, match="no valid JSON"):
        check_run_folder(folder, OPTIONS, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_files_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        check_run_folder(tmp_path, OPTIONS, resume=resume)
    with pytest.raises(RunFolderError):
        check_run_folder(tmp_path / "thesis.tex", OPTIONS, resume=resume)


def test_json_is_old_or_new_but_never_half(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(TypeError):
        write_json(path, {"loss": object()})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    write_json(path, {"loss": 2.0})
    assert json.loads(path.read_text()) == {"loss": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_json(path, {"loss": 1.0})

    def half(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"loss": 2.0})
    assert json.loads(path.read_text()) == {"loss": 1.0}


def test_a_run_is_finished_once_it_has_figures(folder, arguments):
    assert finished_figures(folder / "absent") is None
    assert finished_figures(folder) is None
    write_run(folder, arguments, OPTIONS, {"eval_ce": 1.5, "wall_seconds": 3.0})
    assert finished_figures(folder) == {"eval_ce": 1.5, "wall_seconds": 3.0}
    assert json.loads((folder / RUN_FILE).read_text())["wall_seconds"] == 3.0


def test_only_a_finished_run_may_be_met_by_another_number_of_processes(
    folder, arguments, monkeypatch
):
    write_run(folder, arguments, CONTINUED)
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "world_size", 2)
        with pytest.raises(RunFolderError, match=r"world_size was 1, now 2\).* launch 1 again"):
            write_run(folder, arguments, CONTINUED)
    assert contents(folder) == before
    write_run(folder, arguments, OPTIONS, {"wall_seconds": 3.0})
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    write_run(folder, arguments, CONTINUED)


def test_the_time_of_earlier_sessions_stays_until_there_are_new_figures(folder, arguments):
    assert earlier_seconds(folder / "absent") == earlier_seconds(folder) == 0
    write_run(folder, arguments, OPTIONS, {"wall_seconds": 3.0})
    write_run(folder, arguments, CONTINUED)
    assert finished_figures(folder) is None and earlier_seconds(folder) == 3.0
    write_run(folder, arguments, CONTINUED, {"wall_seconds": 4.0})
    assert earlier_seconds(folder) == 4.0


def test_the_record_is_enough_to_run_it_again(folder):
    record = json.loads((folder / RUN_FILE).read_text())
    assert record["seed"] == 7
    assert (record["world_size"], record["device"]) == (1, "cpu")
    assert record["options"] == OPTIONS
    assert record["versions"].keys() >= {"hf-saereg", "torch", "transformers", "accelerate"}
    assert record["threads"] >= 1 and "git_commit" in record


@pytest.mark.parametrize(
    "place, is_ours",
    [(".", True), ("env/site-packages", False)],
    ids=["its own repository", "installed in another"],
)
def test_the_commit_is_that_of_the_packages_own_repository(
    tmp_path, arguments, monkeypatch, place, is_ours
):
    def git(*words):
        own = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)
        return done.stdout.decode().strip()

    module = tmp_path / place / "hf_saereg" / "run_folder.py"
    module.parent.mkdir(parents=True)
    (tmp_path / place / "setup.cfg").touch()
    git("init")
    git("commit", "--allow-empty", "--message", "first")
    monkeypatch.setattr(run_folder, "__file__", str(module))
    write_run(tmp_path / "run", arguments, OPTIONS)
    record = json.loads((tmp_path / "run" / RUN_FILE).read_text())
    assert record["git_commit"] == (git("rev-parse", "HEAD") if is_ours else None)


@pytest.mark.parametrize("words", [["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_the_recorded_command_holds_no_token(tmp_path, arguments, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "7", *words, "--bf16"])
    write_run(tmp_path / "run", arguments, OPTIONS)
    text = (tmp_path / "run" / RUN_FILE).read_text()
    assert "hf_secret" not in text
    assert json.loads(text)["command"].startswith("train.py --seed 7 ")
    assert json.loads(text)["command"].endswith(" --bf16")


def test_only_the_main_process_writes(tmp_path, arguments, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    write_run(tmp_path / "run", arguments, OPTIONS)
    assert not (tmp_path / "run").exists()
