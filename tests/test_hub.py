"""Push and load over real HTTP, with the real client, against a Hub on this machine."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SITES
from hub_client import digests
from launching import run_python, start_python
from loopback_hub import TOKEN, LoopbackHub
from safetensors.torch import load_file, save_file
from tiny_recipe import configuration
from training_job import SITES as TRAINED_SITES

from hf_saereg.adapters import lora_config
from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.folder import save_heads

PRE_0, PRE_1, POST = SITES
HEAD_FILES = ("cfg.json", "sae_weights.safetensors", "training_state.safetensors")
ROOT_FILES = {"config.json", "generation_config.json", "model.safetensors"}


def heads_of(*hook_names):
    return {f"saes/{hook_name}/{file}" for hook_name in hook_names for file in HEAD_FILES}


def run_calls(hub, folder, calls, token=TOKEN, **variables):
    """Results of calls made one after the other in a fresh process with an empty cache."""
    folder.mkdir(exist_ok=True)
    (folder / "calls.json").write_text(json.dumps(calls))
    client = REPOSITORY / "tests" / "hub_client.py"
    environment = hub.environment(folder / "home", token) | variables
    done = start_python(client, "calls.json", "results.json", folder=folder, **environment)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


def values(results):
    """Of calls none of which failed."""
    assert not [result for result in results if "error" in result]
    return [result["value"] for result in results]


def one_sentence(result, *culprits):
    """The error of a call, which names the culprits."""
    assert "error" in result, result
    assert "\n" not in result["error"]
    for culprit in culprits:
        assert culprit in result["error"]
    return result["error"]


def contents(folder):
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def checkpoint(model, tmp_path):
    """A folder like a trainer's: a checkpoint, and beside it what must stay here."""
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, head_metadata={"dataset_path": "/home/someone/text.txt"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(name))
    (folder / "run.json").write_text(json.dumps({"folder": "/home/someone"}))
    (folder / "saes" / PRE_0 / "weights.pkl").write_bytes(pickle.dumps(1))
    (folder / "saes" / "evil").mkdir()
    (folder / "saes" / "evil" / "cfg.json").write_text("{}")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"0")
    return folder


# ---- push ----


def test_push_publishes_the_layout_and_nothing_else(hub, checkpoint, tmp_path):
    before = contents(checkpoint)
    calls = [
        {"do": "publish", "folder": str(checkpoint), "repo": "someone/model"},
        {"do": "publish", "folder": str(checkpoint), "repo": "someone/model"},
        {"do": "publish", "folder": str(checkpoint), "repo": "bare-name", "revision": "next/one"},
        {"do": "publish", "folder": str(checkpoint), "repo": "someone/model", "create_pr": True}
        | {"commit_message": "A proposal"},
    ]
    commits = values(run_calls(hub, tmp_path / "client", calls))
    assert contents(checkpoint) == before

    published = hub.files("someone/model")
    assert published.keys() == ROOT_FILES | {"README.md", ".gitattributes"} | heads_of(*SITES)
    for name, data in published.items():
        if name.endswith("cfg.json"):
            ours, theirs = json.loads(before[name]), json.loads(data)
            assert theirs["metadata"].pop("model_name") == "someone/model"
            assert theirs == ours
            assert theirs["metadata"]["dataset_path"] == "text.txt"
        elif name != ".gitattributes":
            assert data == before[name], name
        assert b"/home/" not in data and TOKEN.encode() not in data

    assert commits[0].startswith(f"{hub.endpoint}/someone/model/commit/")
    repository = hub.repositories["someone/model"]
    # unchanged files make no commit
    assert repository.messages == ["Init", "Upload model and SAEs"]
    assert commits[1] == commits[0] == commits[3]
    assert "next/one" in hub.repositories["someone/bare-name"].branches
    assert hub.files("someone/bare-name", "next/one").keys() == published.keys()
    assert hub.files("someone/bare-name").keys() == {".gitattributes"}


def test_push_deletes_the_heads_and_shards_that_are_no_more(hub, model, checkpoint, tmp_path):
    old = dict.fromkeys(("model-00001-of-00002.safetensors", "model.safetensors.index.json"), b"0")
    kept = dict.fromkeys(("tokenizer.json", "notes.md", "saes/README.md", "LICENSE"), b"theirs")
    hub.put("someone/model", {**old, **kept, ".gitattributes": b""})
    model.attach_heads([model.heads.configs[1]])
    model.save_pretrained(tmp_path / "later")
    folders = [checkpoint, tmp_path / "later"]
    calls = [{"do": "publish", "folder": str(f), "repo": "someone/model"} for f in folders]
    values(run_calls(hub, tmp_path / "client", calls))
    commits = hub.repositories["someone/model"].commits
    _, first, second = (files.keys() for files in commits.values())
    assert first >= kept.keys() | heads_of(*SITES)
    assert not old.keys() & first
    assert {name for name in second if name.startswith("saes/blocks")} == heads_of(PRE_1)
    assert second >= kept.keys()


def spoil_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "culprits"),
    [
        (spoil_tensor, ["model.safetensors", "NaN", "transformer.ln_f.bias"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04."), ["damaged", "model.safe"]),
        (lambda f: (f / "config.json").unlink(), ["holds no checkpoint"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no weights", "pickles", "never"]),
        (shutil.rmtree, ["no folder", "checkpoint"]),
        (lambda f: (f / "README.md").write_text(f"# In {Path.home()}/runs"), ["README.md", "path"]),
        (lambda f: (f / "README.md").write_text(f"token {TOKEN}"), ["README.md", "token"]),
        (lambda f: (f / "README.md").write_bytes(b"\xff"), ["README.md", "damaged"]),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), ["README.md", "damaged"]),
        (edit_json("config.json", where=["/home/a/b"]), ["config.json", "/home/a/b"]),
        (edit_json("config.json", where="C:\\Users\\a"), ["config.json", "Users"]),
        (edit_json(f"saes/{PRE_0}/cfg.json", a={"b": "/data/a/b"}), ["cfg.json", "/data/a/b"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "damaged"]),
    ],
)
def test_what_may_not_be_published_is_refused_before_the_hub_is_asked(
    checkpoint, monkeypatch, damage, culprits
):
    from hf_saereg import hub
    from hf_saereg.cards import publish
    from hf_saereg.errors import UserError

    monkeypatch.setattr(hub, "HfApi", None)  # calling it would raise
    monkeypatch.setenv("HOME", "/home/someone")
    damage(checkpoint)
    with pytest.raises(UserError) as caught:
        publish(checkpoint, "someone/model")
    assert "\n" not in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)


@pytest.mark.slow
def test_failures_while_pushing_end_in_one_sentence_and_lose_nothing(hub, checkpoint, tmp_path):
    """401, 403, 404, 500 and a cut connection in mid-upload, all in one client."""
    before = contents(checkpoint)
    largest = max(before, key=lambda name: len(before[name]) * name.endswith(".safetensors"))
    oid = hashlib.sha256(before[largest]).hexdigest()
    call = {"do": "publish", "folder": str(checkpoint)}
    hub.put("someone/kept", {"config.json": b"old"})
    calls = [
        call | {"repo": "someone/wrong-token", "token": "hf_" + "wrong" * 7},
        call | {"repo": "someone/forbidden"},
        call | {"repo": "someone/gone"},
        call | {"repo": "someone/kept", "commit_message": "stops at a 500"},
        call | {"repo": "someone/cut-at-commit"},
        call | {"repo": "someone/no such name"},
    ]
    with (
        hub.fault("POST", "someone/forbidden/preupload", 403),
        hub.fault("POST", "someone/gone/preupload", 404),
        hub.fault("PUT", f"/upload/{oid}", 500, times=6),
        hub.fault("POST", "someone/cut-at-commit/commit", times=100),
    ):
        results = run_calls(hub, tmp_path / "client", calls)
    one_sentence(results[0], "401", "someone/wrong-token", "hf auth login")
    one_sentence(results[1], "403", "someone/forbidden", "token")
    one_sentence(results[2], "404", "someone/gone")
    one_sentence(results[3], "500", hub.endpoint, "nothing was published", str(checkpoint))
    one_sentence(results[4], "connection", hub.endpoint, "nothing was published")
    one_sentence(results[5], "no such name")
    assert {result["kind"] for result in results} == {"HubError"}
    assert contents(checkpoint) == before
    assert hub.files("someone/kept") == {"config.json": b"old"}
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())

    with hub.fault("PUT", "/upload/", 500, times=2), hub.fault("PUT", "/upload/", times=1):
        results = run_calls(hub, tmp_path / "again", [call | {"repo": "someone/kept"}])
    assert "value" in results[0]  # it passes, so the push goes on
    assert hub.files("someone/kept")["model.safetensors"] == before["model.safetensors"]


@pytest.mark.slow
def test_model_pushes_itself(hub, checkpoint, tmp_path):
    shutil.rmtree(checkpoint / "saes" / "evil")
    call = {"do": "push_model", "folder": str(checkpoint)}
    calls = [
        call | {"repo": "someone/alone", "head_metadata": {"dataset_path": "plays"}},
        call | {"repo": "someone/saved", "save_to": "saved", "private": True},
    ]
    values(run_calls(hub, tmp_path / "client", calls))
    for repo in ("someone/alone", "someone/saved"):
        names = hub.files(repo).keys() - {".gitattributes", "README.md"}
        assert names == ROOT_FILES | heads_of(*SITES)
        assert (
            hub.files(repo)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        )
    metadata = json.loads(hub.files("someone/alone")[f"saes/{PRE_0}/cfg.json"])["metadata"]
    assert metadata["model_name"] == "someone/alone" and metadata["dataset_path"] == "plays"
    assert (tmp_path / "client" / "saved" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_comes_back_from_the_hub_on_its_base(hub, model, checkpoint, tmp_path):
    """With its heads; from the cache alone, too."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.add_adapter(lora_config(rank=2, alpha=4, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.name_or_path = model.config.name_or_path = "someone/base"
    for config in model.peft_config.values():
        config.base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "saes"}
    assert not files & {"config.json", "model.safetensors"}
    shutil.rmtree(checkpoint / "saes")  # of a base there are none to take by mistake
    adapter = {"do": "load", "repo": "someone/adapter"}
    calls = [
        {"do": "publish", "folder": str(checkpoint), "repo": "someone/base"},
        {"do": "publish", "folder": str(tmp_path / "adapter"), "repo": "someone/adapter"},
        adapter,
        adapter | {"local_files_only": True},
        adapter | {"cache_dir": "elsewhere"},
        adapter | {"hook_names": [PRE_1], "cache_dir": "elsewhere", "local_files_only": True},
    ]
    *_, whole, cached, elsewhere, one = values(run_calls(hub, tmp_path / "client", calls))
    assert whole["digests"] == digests(model)
    assert whole == cached == elsewhere and whole["hook_names"] == SITES
    assert one["hook_names"] == [PRE_1]


def test_an_adapter_whose_base_is_gone_is_refused_in_one_sentence(hub, tmp_path):
    content = json.dumps({"base_model_name_or_path": "someone/gone"}).encode()
    hub.put("someone/adapter", {"adapter_config.json": content})
    hub.put("someone/damaged", {"adapter_config.json": b"{}"})
    calls = [{"do": "load", "repo": f"someone/{name}"} for name in ("adapter", "damaged")]
    gone, damaged = run_calls(hub, tmp_path / "client", calls)
    one_sentence(gone, "someone/gone", "404")
    one_sentence(damaged, "adapter_config.json", "damaged")


# ---- trainer ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainings in one process: their results, and the Hub that they pushed to."""
    folder = tmp_path_factory.mktemp("trained")
    with LoopbackHub() as hub:
        call = {"do": "train", "max_steps": 4, "save_steps": 1, "save_strategy": "steps"}
        call |= {"save_total_limit": 1}
        calls = [
            call | {"output_dir": "end", "push_to_hub": True, "hub_strategy": "end", "push": {}},
            call
            | {"output_dir": "every", "push_to_hub": True, "hub_model_id": "someone/every-save"}
            | {"hub_strategy": "every_save", "hub_always_push": True, "push": {}},
            call
            | {"output_dir": "outage", "push_to_hub": True, "hub_strategy": "every_save"}
            | {"hub_always_push": True}  # or a slow push would leave faults for the last one
            | {"push": {"commit_message": "After the outage", "token": TOKEN}},
            call | {"output_dir": "asked", "push": {"revision": "v1", "private": True}},
            call | {"output_dir": "refused", "push_to_hub": True, "hub_token": "hf_" + "x" * 34},
            call | {"output_dir": "no", "push_to_hub": True, "hub_strategy": "checkpoint"},
            call | {"output_dir": "no", "push_to_hub": True, "hub_strategy": "all_checkpoints"},
        ]
        with hub.fault("POST", "someone/outage/preupload", 403, times=2):
            results = run_calls(hub, folder / "client", calls)
        yield hub, folder / "client", results


@pytest.mark.slow
def test_trainer_pushes_at_the_end(trained):
    hub, folder, results = trained
    files = hub.files("someone/end")
    assert files.keys() >= ROOT_FILES | heads_of(*TRAINED_SITES) | {"tokenizer.json"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert hub.repositories["someone/end"].messages == ["Init", "End of training"]
    assert files.keys() >= {"README.md", "training.json"}
    for name in ("model.safetensors", *heads_of(*TRAINED_SITES)):
        if name.endswith(".safetensors"):
            assert files[name] == (folder / "end" / name).read_bytes()
    assert results[0]["value"]["steps"] == 4


@pytest.mark.slow
def test_published_files_name_neither_token_nor_folder(trained):
    hub, folder, _ = trained
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            for data in files.values():
                for secret in (TOKEN, str(folder), str(Path.home()), "/home/someone"):
                    assert secret.encode() not in data


@pytest.mark.slow
def test_trainer_pushes_every_save(trained):
    hub, folder, _ = trained
    messages = hub.repositories["someone/every-save"].messages
    steps = [f"Training in progress, step {step}" for step in (1, 2, 3, 4)]
    assert messages[:5] == ["Init", *steps]
    first, last = [list(hub.repositories["someone/every-save"].commits.values())[i] for i in (1, 4)]
    assert first.keys() >= ROOT_FILES | heads_of(*TRAINED_SITES) | {"tokenizer.json"}
    assert first["model.safetensors"] != last["model.safetensors"]
    weights = f"saes/{TRAINED_SITES[0]}/sae_weights.safetensors"
    assert first[weights] != last[weights]
    assert not list((folder / "every").glob(".pushing-*"))


@pytest.mark.slow
def test_outage_of_the_hub_does_not_end_a_training(trained):
    hub, folder, results = trained
    assert results[2]["value"]["steps"] == 4
    assert hub.repositories["someone/outage"].messages[-1] == "After the outage"
    here = (folder / "outage" / "model.safetensors").read_bytes()
    assert hub.files("someone/outage")["model.safetensors"] == here


@pytest.mark.slow
def test_trainer_pushes_when_asked(trained):
    hub, _, _ = trained
    assert hub.files("someone/asked", "v1").keys() >= ROOT_FILES | heads_of(*TRAINED_SITES)
    assert hub.files("someone/asked").keys() == {".gitattributes"}


@pytest.mark.slow
def test_refused_access_shows_before_the_first_step(trained):
    _, folder, results = trained
    one_sentence(results[4], "401", "refused")
    assert not (folder / "refused").exists()


@pytest.mark.slow
def test_strategies_that_publish_pickles_are_refused(trained):
    for strategy, result in zip(("checkpoint", "all_checkpoints"), trained[2][5:], strict=True):
        one_sentence(result, repr(strategy), "pickle", "every_save")
    assert "someone/no" not in trained[0].repositories


# ---- load ----


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    """Loads in a fresh process with an empty cache."""
    hub, _, results = trained
    folder = tmp_path_factory.mktemp("loaded")
    files = hub.files("someone/end")
    nested = {f"runs/best/{name}": data for name, data in files.items()}
    for repo in ("whole", "some-heads", "no-heads", "one-head", "resumed"):
        hub.put(f"someone/{repo}", files)
    hub.put("someone/nested", nested)
    hub.put("someone/moved", {"config.json": b"{}"})
    hub.put("someone/moved", files, branch="v2")
    site = TRAINED_SITES[1]
    calls = {
        "whole": {"do": "load", "repo": "someone/whole"},
        "some-heads": {"do": "load", "repo": "someone/some-heads", "hook_names": [site]},
        "no-heads": {"do": "load", "repo": "someone/no-heads", "hook_names": []},
        "nested": {"do": "load", "repo": "someone/nested", "subfolder": "runs/best"},
        "moved": {"do": "load", "repo": "someone/moved", "revision": "v2", "token": TOKEN},
        "elsewhere": {"do": "load", "repo": "someone/whole", "cache_dir": "other_cache"},
        "cached": {"do": "load", "repo": "someone/whole", "local_files_only": True},
        "cached-partly": {"do": "load", "repo": "someone/some-heads", "local_files_only": True},
        "one-head": {"do": "head", "repo": "someone/one-head", "hook_name": site},
        "resumed": {"do": "load", "repo": "someone/resumed"},
    }
    oid = hashlib.sha256(files["model.safetensors"]).hexdigest()
    count = len(hub.requests)
    with hub.fault("GET", f"/{oid}", after_bytes=1000, times=1):  # the first load resumes
        found = run_calls(hub, folder / "client", list(calls.values()))
    return hub, results[0]["value"]["digests"], dict(zip(calls, found, strict=True)), count, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "nested", "moved", "elsewhere", "cached", "resumed"])
def test_loaded_model_is_the_trained_one_byte_for_byte(loaded, name):
    _, digests, results, *_ = loaded
    assert results[name]["value"]["digests"] == digests
    assert results[name]["value"]["hook_names"] == TRAINED_SITES


@pytest.mark.slow
def test_loaded_model_names_the_repository_not_the_cache(loaded):
    assert loaded[2]["whole"]["value"]["name"] == ["someone/whole"] * 2


def asked_of(loaded, repo):
    hub, _, _, count, _ = loaded
    names = (
        path.split("/resolve/")[1].split("/", 1)[1]
        for method, path in hub.requests[count:]
        if path.startswith(f"/{repo}/resolve/")
    )
    return set(names)


@pytest.mark.slow
def test_only_the_heads_asked_for_are_downloaded(loaded):
    _, digests, results, *_ = loaded
    site = TRAINED_SITES[1]
    assert asked_of(loaded, "someone/some-heads") == ROOT_FILES | heads_of(site)
    assert asked_of(loaded, "someone/no-heads") == ROOT_FILES
    some = results["some-heads"]["value"]
    assert some["hook_names"] == [site]
    assert some["digests"].items() <= digests.items()
    assert not results["no-heads"]["value"]["hook_names"]


@pytest.mark.slow
def test_one_head_comes_without_the_model(loaded):
    _, digests, results, *_ = loaded
    site = TRAINED_SITES[1]
    assert asked_of(loaded, "someone/one-head") == {"config.json"} | heads_of(site)
    found = results["one-head"]["value"]
    prefix = f"heads.{site.replace('.', '_')}."
    ours = {
        name.removeprefix(prefix): digest
        for name, digest in digests.items()
        if name.startswith(prefix)
    }
    assert found == {"digests": ours, "family": "TopKSAE", "training": False}


@pytest.mark.slow
def test_cache_that_lacks_a_head_is_no_model_without_it(loaded):
    one_sentence(loaded[2]["cached-partly"], "someone/some-heads", "local_files_only")


@pytest.mark.slow
def test_cache_goes_where_it_is_told_to(loaded):
    cache = loaded[4] / "client" / "other_cache" / "models--someone--whole"
    assert list(cache.glob("snapshots/*/model.safetensors"))


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def with_cfg(files, hook_name=PRE_0, **changes):
    name = f"saes/{hook_name}/cfg.json"
    return files | {name: json.dumps(json.loads(files[name]) | changes).encode()}


def renamed(files, old, new):
    return {name.replace(old, new): data for name, data in files.items()}


@pytest.mark.slow
def test_bad_repositories_and_connections_end_in_one_sentence(hub, checkpoint, tmp_path):
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    spoil = tmp_path / "spoilt"
    files = {k: v for k, v in contents(checkpoint).items() if k in ROOT_FILES | heads_of(*SITES)}
    save_file(
        load_file(checkpoint / "model.safetensors")
        | {"transformer.wpe.weight": torch.full((32, 16), torch.inf)},
        spoil,
        metadata={"format": "pt"},
    )
    weights = f"saes/{PRE_0}/sae_weights.safetensors"
    head = load_file(checkpoint / weights)
    save_file(head | {"b_dec": torch.full((16,), torch.nan)}, tmp_path / "nan")
    wide = make_head(SAEHeadConfig("standard", PRE_0, 24, 40))
    save_heads([wide], tmp_path / "wide")
    elsewhere = json.loads(files[f"saes/{PRE_0}/cfg.json"])["metadata"] | {"hook_name": "../../x"}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": bomb}
    bert = json.dumps({"model_type": "bert", "hidden_size": 16}).encode()
    repositories = {
        "bert": ({**files, "config.json": bert}, ["bert", "GPT-2"]),
        "no-model": ({"README.md": b"# Data"}, ["no config.json"]),
        "narrow": (with_cfg(files, d_in=24), [PRE_0]),
        "wide": (files | contents(tmp_path / "wide"), [PRE_0, "24 dimensions", "16"]),
        "lying": (with_cfg(files, metadata=elsewhere), ["'../../x'", PRE_0]),
        "deep": (renamed(files, POST, "blocks.7.hook_resid_post"), ["blocks.7.hook_resid_post"]),
        "leaving": (renamed(files, f"saes/{PRE_0}", "saes/..evil"), ["..evil"]),
        "nan": ({**files, "model.safetensors": spoil.read_bytes()}, ["infinity", "wpe"]),
        "nan-head": ({**files, weights: (tmp_path / "nan").read_bytes()}, ["NaN", "b_dec"]),
        "pickle": (pickled, ["pickle", "safetensors"]),
        "pickled-head": ({**files, weights: bomb}, [PRE_0, "damaged"]),
        "disguised": ({**files, "model.safetensors": bomb}, ["model.safetensors", "damaged"]),
        "unreadable": ({**files, "config.json": b"[]"}, ["config.json", "damaged"]),
        "headless": ({k: files[k] for k in ROOT_FILES}, [PRE_1, "headless"]),
        "cut": (files, ["connection", "kept in the cache"]),
        "broken": (files, ["500"]),
    }  # fmt: skip
    calls = []
    for name, (held, _) in repositories.items():
        hub.put(f"someone/{name}", held)
        calls.append({"do": "load", "repo": f"someone/{name}"})
    calls[-3]["hook_names"] = [PRE_1]
    further = [
        ({"do": "load", "repo": "someone/nonesuch"}, ["404", "someone/nonesuch"]),
        ({"do": "load", "repo": "someone/bert", "revision": "v9"}, ["revision", "'v9'"]),
        ({"do": "load", "repo": "someone/secret", "token": "hf_" + "y" * 34}, ["401"]),
        ({"do": "load", "repo": "someone/uncached", "local_files_only": True}, ["cache"]),
        ({"do": "load", "repo": "no/such/folder"}, ["no/such/folder", "folder"]),
        ({"do": "load", "repo": "someone/deep", "hook_names": ["../../x"]}, ["'../../x'"]),
        ({"do": "head", "repo": "someone/cut", "hook_name": POST + "/../.."}, ["hook name"]),
        ({"do": "head", "repo": "someone/bert", "hook_name": "blocks.9.hook_resid_pre"},
         ["blocks.9.hook_resid_pre", "missing"]),
    ]  # fmt: skip
    calls += [call for call, _ in further]
    with (
        hub.fault("GET", "someone/cut/resolve/.*generation_config", after_bytes=20, times=100),
        hub.fault("GET", "someone/broken/resolve/.*generation_config", 500, times=100),
    ):
        results = run_calls(hub, tmp_path / "client", calls)
    culprits = [names for _, names in repositories.values()] + [names for _, names in further]
    for result, names in zip(results, culprits, strict=True):
        one_sentence(result, *names)
    assert not exploded.exists()
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".pkl"))]
    before = len(hub.requests)
    [offline] = run_calls(hub, tmp_path / "offline", calls[:1], HF_HUB_OFFLINE="1")
    one_sentence(offline, "someone/bert", "HF_HUB_OFFLINE")
    assert len(hub.requests) == before


@pytest.mark.slow
def test_recipe_publishes_both_models_with_what_was_measured(hub, tmp_path):
    config = configuration(
        tmp_path, push_to_hub=True, hub_model_id="someone/plays", hub_strategy="end", max_steps=10
    )
    environment = {**hub.environment(tmp_path / "home"), "HF_DATASETS_CACHE": tmp_path / "cache"}
    run_python(REPOSITORY / "recipes" / "train_character.py", "--config", config, **environment)
    assert hub.repositories.keys() == {"someone/plays", "someone/plays-plain"}
    files = hub.files("someone/plays")
    assert files.keys() >= ROOT_FILES | {"README.md", "tokenizer.json", "figures/compound.png"}
    assert not [name for name in hub.files("someone/plays-plain") if name.startswith("saes/")]
    card = files["README.md"].decode()
    assert "| co-trained | standard |" in card and "| fresh | topk | 2 |" in card
    assert 'from_pretrained("someone/plays")' in card
    for data in (data for files in map(hub.files, hub.repositories) for data in files.values()):
        assert str(tmp_path).encode() not in data and TOKEN.encode() not in data
    record = (tmp_path / "run" / "run.json").read_text()
    assert TOKEN not in record
