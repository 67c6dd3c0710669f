"""Model cards: what they say, that the Hub takes them, that their snippets run as they stand."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY, SITES
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from loopback_hub import LoopbackHub

from hf_saereg.card_facts import read_facts
from hf_saereg.cards import is_unedited, make_card, write_card
from hf_saereg.corpora import character_tokenizer

RECORD = {
    "base_model": None,
    "dataset": "karpathy/tiny_shakespeare",
    "steps": 500,
    "tokens_per_step": 4096,
    "train_seconds": 90.5,
    "seed": 3,
    "world_size": 1,
    "device": "cpu",
    "evaluation": {
        "eval_loss": 2.371,
        **{f"eval_l0/{site}": 9.5 for site in SITES},
        **{f"eval_fvu/{site}": 0.125 for site in SITES},
        **{f"eval_dead_fraction/{site}": 0.25 for site in SITES},
    },
    "options": {"learning_rate": 0.002},
    "versions": {"torch": "2.13.0"},
}
BLOCK_ALL = "import sys; sys.modules['hf_saereg'] = None\n"


@pytest.fixture
def checkpoint(model, tmp_path):
    """A trained model's folder, without a card."""
    folder = tmp_path / "regularized"
    model.save_pretrained(folder)
    character_tokenizer(32).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture
def comparison(checkpoint):
    """What a comparison leaves one folder above."""
    labels = {"model": "regularized", "family": "topk", "source": "cotrained", "sparsity": 5}
    rows = [
        {**labels, "site": site, "l0": 4.5, "fvu": 0.5, "dead_fraction": 0.0, "ce_increase": 0.0625}
        for site in SITES
    ]
    compound = [{**labels, "sum_l0": 13.5, "ce_increase": 0.1875}]
    compound += [{**compound[0], "source": "fresh", "ce_increase": 0.4375}]
    others = [{**row, "model": "plain", "ce_increase": 9.0} for row in (*rows, *compound)]
    results = {"rows": rows + others[:3], "compound": compound + others[3:]}
    (checkpoint.parent / "results.json").write_text(json.dumps(results))
    (checkpoint.parent / "figures").mkdir()
    (checkpoint.parent / "figures" / "compound.png").write_bytes(b"PNG")
    return checkpoint


def written(folder, repo="someone/model"):
    return write_card(folder, repo).read_text()


def test_metadata_is_what_the_hub_reads(checkpoint):
    data = ModelCard(written(checkpoint)).data
    assert data.license == "mit"
    assert {"sae-regularization", "saelens", "topk", "standard"} <= set(data.tags)
    assert data.datasets == ["karpathy/tiny_shakespeare"]
    assert data.base_model is None and data.pipeline_tag == "text-generation"
    values = {(r.metric_type, r.metric_name.split(" at ")[-1]): r.metric_value
              for r in data.eval_results}  # fmt: skip
    assert values["cross-entropy", "cross-entropy, nats a token"] == 2.371
    assert all(values["l0", site] == 9.5 and values["fvu", site] == 0.125 for site in SITES)
    assert not [kind for kind, _ in values if kind == "ce_increase"]  # not measured
    index = eval_results_to_model_index("model", data.eval_results)
    assert index == yaml.safe_load(written(checkpoint).split("---")[1])["model-index"]


def test_card_says_what_was_trained_and_how(checkpoint):
    text = written(checkpoint)
    for fact in ("2 layers, 4 heads, width 16, context 32", "500", "4096", "90 s", "22,630 tokens",
                 "learning_rate: 0.002", "2.3710 nats", "torch 2.13.0"):  # fmt: skip
        assert fact in text, fact
    for site, family, d_sae in zip(
        SITES, ("standard", "topk", "standard"), (40, 96, 24), strict=True
    ):
        assert f"| `{site}` | {family} | {d_sae} | 9.5 | 0.125 | 0.25 | – |" in text
    assert "\n\n\n" not in text


def test_comparison_one_folder_above_fills_the_table(comparison):
    text = written(comparison)
    assert f"| `{SITES[1]}` | topk | 96 | 4.5 | 0.5 | 0 | 0.0625 |" in text
    assert "| co-trained | topk | 5 | 13.5 | 0.188 |" in text
    assert "| fresh | topk | 5 | 13.5 | 0.438 |" in text
    assert "(figures/compound.png)" in text
    assert (comparison / "figures" / "compound.png").read_bytes() == b"PNG"
    results = ModelCard(text).data.eval_results
    assert {0.1875, 0.4375} <= {r.metric_value for r in results}
    assert 9.0 not in {r.metric_value for r in results}


def test_model_without_saes_says_so(checkpoint):
    shutil.rmtree(checkpoint / "saes")
    text = written(checkpoint)
    assert "no sparse autoencoders" in text
    assert "hf_saereg import" not in text and "sae_lens" not in text


def test_fine_tuned_model_and_adapter_name_their_base(checkpoint):
    record = RECORD | {"base_model": "openai-community/gpt2"}
    (checkpoint / "training.json").write_text(json.dumps(record))
    tuned = ModelCard(written(checkpoint))
    assert tuned.data.base_model == "openai-community/gpt2"
    assert "openai-community/gpt2 (" in tuned.text and "fine-tuned" in tuned.text
    for name in ("config.json", "model.safetensors", "README.md"):
        (checkpoint / name).unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "openai-community/gpt2"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    lora = ModelCard(written(checkpoint))
    assert lora.data.base_model == "openai-community/gpt2" and lora.data.library_name == "peft"
    assert "PeftModel.from_pretrained" in lora.text and "SAEHead.from_pretrained" in lora.text


def test_every_template_passes_the_hub_s_own_check(checkpoint, monkeypatch):
    facts = read_facts(checkpoint, "someone/model")
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        for kind in ("character", "finetuned", "lora"):
            facts.kind, facts.base_model = kind, "openai-community/gpt2"
            ModelCard(make_card(facts)).validate()
        assert len(hub.requests) == 3


def test_only_unedited_cards_are_written_anew(checkpoint):
    first = written(checkpoint, "someone/model")
    assert is_unedited(first)
    second = written(checkpoint, "someone/other")
    assert "someone/other" in second and "someone/model" not in second
    path = checkpoint / "README.md"
    path.write_text(second.replace("## Limits", "## Limits that I know of"))
    assert written(checkpoint, "someone/third") == path.read_text()
    assert "Limits that I know of" in path.read_text()


# ---- snippets ----


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def run_python(code, environment, folder):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_snippets_of_a_card_run_as_they_stand(checkpoint, home):
    """From the Hub: `transformers` alone, ours, and `sae-lens` where it is installed."""
    plain, ours, theirs = snippets(written(checkpoint))
    site = "blocks.1.hook_resid_pre"
    with LoopbackHub() as hub:
        files = (p for p in checkpoint.rglob("*") if p.is_file())
        hub.put("someone/model",
                {p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in files})  # fmt: skip
        environment = os.environ | hub.environment(home, token=None) | {"OMP_NUM_THREADS": "1"}
        assert run_python(BLOCK_ALL + plain, environment, home).startswith("First")
        environment["PYTHONPATH"] = f"{REPOSITORY}:{environment.get('PYTHONPATH', '')}"
        assert run_python(ours, environment, home).strip() == "tensor([[5, 5, 5, 5, 5, 5, 5, 5]])"
        pytest.importorskip("sae_lens", reason="sae-lens is not installed; the others did run")
        assert run_python(theirs, environment, home).strip() == f"topk 96 {site}"


# ---- the wheel ----

IN_THE_WHEEL = """
import sys
from pathlib import Path
import hf_saereg
from hf_saereg.cards import write_card

target = Path(sys.argv[1])
assert target in Path(hf_saereg.__file__).parents, hf_saereg.__file__
print(write_card(Path(sys.argv[2]), "someone/model").read_text())
"""


@pytest.mark.slow
def test_wheel_holds_every_module_and_makes_a_card(checkpoint, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    install = [*pip, "install", "--no-deps", "--target", target]
    for command in (build, install):
        if command is install:
            command = [*install, next(tmp_path.glob("*.whl"))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    here = {p.relative_to(REPOSITORY) for p in (REPOSITORY / "hf_saereg").rglob("*.py")}
    assert {p.relative_to(target) for p in (target / "hf_saereg").rglob("*.py")} == here
    templates = {p.name for p in (REPOSITORY / "model_cards").glob("*.j2")}
    assert {p.name for p in (target / "hf_saereg" / "model_cards").iterdir()} == templates
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_WHEEL, target, checkpoint],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == written(checkpoint).strip()
