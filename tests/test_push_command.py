"""`saereg push`, as users start it, against a Hub on this machine."""

import pickle

import pytest
from huggingface_hub import ModelCard
from launching import start_python
from loopback_hub import TOKEN

from hf_saereg import cli
from hf_saereg.cards import is_unedited

WRONG_TOKEN = "hf_" + "wrong" * 7


@pytest.fixture
def push(hub, tmp_path):
    """The command in a process of its own."""

    def run(*words, token=TOKEN):
        environment = hub.environment(tmp_path / "home", token)
        done = start_python("-m", "hf_saereg.cli", "push", *words, folder=tmp_path, **environment)
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def checkpoint(model, tmp_path):
    """What a trainer leaves, its pickles too."""
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "training_args.bin").write_bytes(pickle.dumps(1))
    return tmp_path / "checkpoint"


def sentence(done):
    """That the command ended with."""
    assert done.returncode == 1, done.stderr
    assert not done.stdout
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: ") and said.endswith(".") and "Traceback" not in done.stderr
    return said


@pytest.mark.slow
def test_a_checkpoint_is_published_as_asked(hub, push, checkpoint):
    options = ["--private", "true", "--revision", "v1", "--license", "apache-2.0"]
    done = push("checkpoint", "model", *options, "--commit_message", "A first version")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["someone/model"]
    assert repository.private and repository.messages == ["Init", "A first version"]
    assert repository.branches.keys() == {"main", "v1"}
    files = hub.files("someone/model", "v1")
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    assert "training_args.bin" not in files
    assert hub.files("someone/model").keys() == {".gitattributes"}
    card = files["README.md"].decode()
    assert is_unedited(card) and ModelCard(card).data.license == "apache-2.0"
    assert 'from_pretrained("someone/model")' in card
    address = f"{hub.endpoint}/someone/model/commit/{repository.branches['v1']}"
    assert done.stdout == f"Published checkpoint as {address}\n"


@pytest.mark.slow
def test_what_the_hub_refuses_ends_in_one_sentence(hub, push, checkpoint):
    """401 without a token, 404 where nothing can be made, a public repository for a private one."""
    refused = sentence(push("checkpoint", "someone/model", token=None))
    assert all(part in refused for part in ("(401)", "someone/model", "hf auth login"))
    with hub.fault("POST", "/api/repos/create", 404):
        missing = sentence(push("checkpoint", "nowhere/model"))
    assert "(404)" in missing and "nowhere/model" in missing
    assert not hub.repositories
    hub.put("someone/public", {"config.json": b"old"})
    public = sentence(push("checkpoint", "someone/public", "--private", "true"))
    assert "someone/public is there already and public" in public
    assert hub.files("someone/public") == {"config.json": b"old"}
    assert (checkpoint / "model.safetensors").is_file()


def without_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def emptied(folder):
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def edited_card(folder):
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\nMine\n")


@pytest.mark.parametrize(
    ("damage", "words", "culprits"),
    [
        (None, ["missing", "someone/model"], ["no folder missing"]),
        (emptied, ["checkpoint", "someone/model"], ["checkpoint holds no checkpoint"]),
        (without_weights, ["checkpoint", "someone/model"], ["pickles, such as pytorch_model.bin"]),
        (edited_card, ["checkpoint", "someone/model", "--license", "mit"], ["gpl-3.0", "by hand"]),
        (None, ["checkpoint"], ["required: --repo"]),
        (None, ["checkpoint", "someone/model", "twice"], ["'twice'"]),
        (None, ["checkpoint", "someone/model", "--token", WRONG_TOKEN], ["hf auth login"]),
        (None, ["checkpoint", "someone/model", "--licence", "mit"], ["did you mean 'license'"]),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(
    checkpoint, monkeypatch, damage, words, culprits
):
    monkeypatch.setattr("hf_saereg.hub.HfApi", None)  # calling it would raise
    monkeypatch.chdir(checkpoint.parent)
    if damage is not None:
        damage(checkpoint)
    with pytest.raises(SystemExit) as end:
        cli.main(["push", *words])
    said = end.value.code
    assert said.startswith("error: ") and "\n" not in said and WRONG_TOKEN not in said
    for culprit in culprits:
        assert culprit in said
