"""Model cards: what they say, that the Hub takes them, that their snippets run as they stand."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from checkouts import copy_checkout
from conftest import REPOSITORY, SITES
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from launching import run_python
from loopback_hub import LoopbackHub
from peft import LoraConfig, PeftModel, get_peft_model
from snippets import blocks, run_snippets
from transformers import GPT2LMHeadModel

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


def test_tokens_that_the_heads_skip_are_named(plain_model, head_configs, checkpoint, tmp_path):
    assert "do not read" not in written(checkpoint)
    plain_model.attach_heads(
        replace(config, skip_positions=1, skip_tokens=[7, 100]) for config in head_configs
    )
    plain_model.save_pretrained(tmp_path / "skipping")
    text = written(tmp_path / "skipping")
    assert "- first positions of a row that SAEs do not read: 1\n" in text
    assert "- token ids that SAEs do not read: [7, 100]\n" in text


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


@pytest.fixture
def tuned(checkpoint, tmp_path):
    """A model that was fine-tuned from another one."""
    folder = shutil.copytree(checkpoint, tmp_path / "tuned")
    record = RECORD | {"base_model": "someone/base"}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def adapter(tuned, tmp_path):
    """What `peft` saves of an adapter for that base, its own card included, and heads beside it."""
    base = GPT2LMHeadModel.from_pretrained(tuned)
    base.config._name_or_path = base.name_or_path = "someone/base"
    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    lora = LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path / "adapter"
    get_peft_model(base, lora).save_pretrained(folder, save_embedding_layers=False)
    shutil.copytree(tuned / "saes", folder / "saes")
    shutil.copyfile(tuned / "training.json", folder / "training.json")
    return folder


def test_fine_tuned_model_names_its_base(tuned):
    card = ModelCard(written(tuned))
    assert card.data.base_model == "someone/base"
    assert "someone/base (" in card.text and "fine-tuned" in card.text


def test_adapter_names_its_base_in_place_of_what_peft_wrote(adapter):
    assert "[More Information Needed]" in (adapter / "README.md").read_text()
    card = ModelCard(written(adapter))
    assert card.data.base_model == "someone/base" and card.data.library_name == "peft"
    assert "PeftModel.from_pretrained" in card.text and "[More" not in card.text


def test_what_peft_writes_into_our_card_is_no_edit(adapter, tuned):
    """It does so whenever it saves an adapter into the folder again."""
    base = GPT2LMHeadModel.from_pretrained(tuned)
    first = written(adapter, "someone/one")
    PeftModel.from_pretrained(base, adapter).save_pretrained(adapter, save_embedding_layers=False)
    touched = (adapter / "README.md").read_text()
    assert touched != first and is_unedited(touched)
    assert written(adapter, "someone/one") == first
    touched = touched.replace("## Limits", "## My limits")
    (adapter / "README.md").write_text(touched)
    assert written(adapter, "someone/two") == touched


def test_license_asked_for_replaces_that_of_an_unedited_card(checkpoint):
    assert ModelCard(written(checkpoint)).data.license == "mit"
    write_card(checkpoint, "someone/model", "apache-2.0")
    assert ModelCard(written(checkpoint)).data.license == "apache-2.0"


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


def put(hub, folder, repo):
    """Publish a folder with a card of its own; returns the card's snippets."""
    card = written(folder, repo)
    files = (path for path in folder.rglob("*") if path.is_file())
    hub.put(repo, {p.relative_to(folder).as_posix(): p.read_bytes() for p in files})
    return [code for _, code in blocks(card, "python")]


@pytest.mark.slow
def test_snippets_of_every_card_run_as_they_stand(hub, checkpoint, tuned, adapter, tmp_path):
    """From the Hub: without us, with us, and with `sae-lens` where it is installed."""
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    for path in ("saes", "tokenizer.json", "tokenizer_config.json"):
        (shutil.rmtree if (bare / path).is_dir() else Path.unlink)(bare / path)
    put(hub, tuned, "someone/base")
    folders = {"character": checkpoint, "tuned": tuned, "adapter": adapter, "bare": bare}
    cards = {name: put(hub, folder, f"someone/{name}") for name, folder in folders.items()}
    assert [len(codes) for codes in cards.values()] == [3, 3, 3, 1]
    plain, ours, theirs = ([codes[i] for codes in cards.values() if codes[i:]] for i in range(3))
    environment = hub.environment(tmp_path / "home", token=None)

    with_sae_lens = importlib.util.find_spec("sae_lens") is not None
    without_us = plain + theirs if with_sae_lens else plain
    printed = run_snippets(without_us, tmp_path, blocked=["hf_saereg"], **environment)
    assert printed[0].startswith("First") and printed[1].startswith("First")
    assert printed[2:4] == ["someone/base\n", "2 layers; this repository has no tokenizer\n"]
    features = "tensor([[5, 5, 5, 5, 5, 5, 5, 5]])\n"
    assert run_snippets(ours, tmp_path, **environment) == [features, features, "topk 96\n"]
    if not with_sae_lens:
        pytest.skip("sae-lens is not installed; the other snippets did run")
    assert printed[4:] == [f"topk 96 {SITES[1]}\n"] * 3


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
    source, target = copy_checkout(tmp_path / "source"), tmp_path / "target"
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    run_python(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    run_python(*pip, "install", "--no-deps", "--target", target, wheel)
    here = {p.relative_to(REPOSITORY) for p in (REPOSITORY / "hf_saereg").rglob("*.py")}
    assert {p.relative_to(target) for p in (target / "hf_saereg").rglob("*.py")} == here
    templates = {p.name for p in (REPOSITORY / "model_cards").glob("*.j2")}
    assert {p.name for p in (target / "hf_saereg" / "model_cards").iterdir()} == templates
    code = ("-c", IN_THE_WHEEL, target, checkpoint)
    assert (
        run_python(*code, folder=tmp_path, PYTHONPATH=target).strip() == written(checkpoint).strip()
    )
