"""The fine-tuning recipe: every mode by its YAML, on checkpoints in the official layout."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from launching import launch_two
from safetensors.torch import load_file
from tiny_checkpoint import SITES, save_official_layout, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from hf_saereg.errors import one_sentence_errors
from hf_saereg.finetuning import BaseModelArguments
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.run_folder import finished_figures

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
TOKENIZER = SHARED_DATA / "gpt2-tokenizer"
WIKITEXT = SHARED_DATA / "wikitext2-valid.txt"
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}

needs_shared_data = pytest.mark.skipif(
    not (TOKENIZER.is_dir() and WIKITEXT.is_file()), reason=f"{SHARED_DATA} is not there"
)


def program(name):
    """A recipe's module."""
    path = RECIPES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look there for their types
    spec.loader.exec_module(module)
    return module


def call(name, cache, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        with one_sentence_errors():
            program(name).main()


def words(**options):
    """Options as words of a command line."""
    found = []
    for name, value in options.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


STEPS = {
    **{"max_steps": 4, "warmup_steps": 0, "logging_steps": 2, "save_steps": 2},
    **{"eval_strategy": "steps", "eval_steps": 2},
    **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
    **{"gradient_accumulation_steps": 1, "use_cpu": "true", "report_to": "none"},
    **{"disable_tqdm": "true"},
}
HEADS = {"d_sae": [48], "k": [4], "block_size": 32}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A tiny GPT-2 in the official layout, with the true tokenizer."""
    return save_official_layout(tmp_path_factory.mktemp("official") / "gpt2", TOKENIZER, **TINY)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What the pre-training recipe makes of a few words, by its YAML."""
    folder = tmp_path_factory.mktemp("base")
    text = write_text(folder / "text.txt", words=6000)
    options = {"dataset": text, "output_dir": folder / "gpt2_base", "vocab_size": 270}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.1}
    config = RECIPES / "gpt2_base.yaml"
    options |= STEPS | shape | {"max_steps": 30, "eval_steps": 30, "save_steps": 30}
    call("pretrain_gpt2", folder / "cache", "--config", config, *words(**options))
    return folder


def finetune(folder, config, **options):
    own = STEPS | HEADS | {"output_dir": folder / "run"} | options
    call("finetune_gpt2", folder / "cache", "--config", RECIPES / f"{config}.yaml", *words(**own))
    return folder / "run"


def on_base(base, folder, config, **options):
    own = {"model_name_or_path": base / "gpt2_base", "dataset": base / "text.txt"}
    return finetune(folder, f"gpt2_base_{config}", **own, **options)


def test_pretraining_makes_a_stock_checkpoint_with_its_own_tokenizer(base):
    run = base / "gpt2_base"
    model, tokenizer = (kind.from_pretrained(run) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert type(model).__name__ == "GPT2LMHeadModel" and not (run / "saes").exists()
    assert len(tokenizer) == model.config.vocab_size == 270
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    text = "To be, or nöt\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert finished_figures(run)["eval_ce"] < 5.5  # of a uniform guess it would be 5.6


@pytest.mark.parametrize(
    "config, options",
    [
        ("joint", {"anchor_weight": 1.0}),
        ("joint", {"mode": "plain", "anchor_weight": 1.0}),
        ("lora", {}),
        ("heads", {}),
    ],
    ids=["joint", "plain", "lora", "heads"],
)
def test_a_mode_trains_by_its_yaml(base, tmp_path, config, options):
    run = on_base(base, tmp_path, config, **options)
    figures = finished_figures(run)
    assert figures["steps"] == 4 and figures["eval_ce"] > 0
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in log)
    mode = options.get("mode", config)
    saes = sorted(path.name for path in run.glob("saes/*"))
    assert saes == ([] if mode == "plain" else sorted(SITES))
    assert (run / "adapter_model.safetensors").exists() == (mode == "lora")
    assert (run / "README.md").is_file()
    if mode != "heads":
        assert figures["base_ce"] > 0 and figures["kl_to_base"] > 0
    if mode == "lora":
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")
        assert type(merged).__name__ == "GPT2LMHeadModel"
        assert sorted(path.name for path in (run / "merged").glob("saes/*")) == sorted(SITES)
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (base / "gpt2_base", run / "merged" if mode == "lora" else run)
    )
    assert before.keys() == after.keys()
    same = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert same == (mode == "heads")


@pytest.mark.slow
def test_two_processes_tune_adapters_by_the_recipe_and_the_first_alone_writes(base, tmp_path):
    run = tmp_path / "run"
    own = {"model_name_or_path": base / "gpt2_base", "dataset": base / "text.txt"}
    own |= STEPS | HEADS | {"output_dir": run, "max_steps": 2}
    own |= {"anchor_weight": 1.0, "lora_dropout": 0.0}
    recipe = [RECIPES / "finetune_gpt2.py", "--config", RECIPES / "gpt2_base_lora.yaml"]
    job = [Path(__file__).with_name("watched_job.py"), tmp_path]
    printed = launch_two(*job, *recipe, *words(**own), HF_DATASETS_CACHE=tmp_path / "cache")
    assert printed.count("'eval_ce': ") == 1
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    figures = finished_figures(run)
    assert figures["steps"] == 2 and figures["kl_to_base"] > 0 and figures["train_ce"] > 0
    by_first, by_second = (
        {Path(path).name for path in json.loads(opened.read_text()) if path.startswith(f"{run}/")}
        for opened in (tmp_path / "opened_0.json", tmp_path / "opened_1.json")
    )
    assert by_first >= {"run.json.tmp", "adapter_config.json", "config.json", "README.md"}
    assert by_second <= {"rng_state_1.pth"}
    adapted = SAERegGPT2LMHeadModel.from_pretrained(run).eval()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    assert adapted.has_adapters and sorted(adapted.heads.hook_names) == sorted(SITES)
    assert sorted(path.name for path in (run / "merged").glob("saes/*")) == sorted(SITES)
    input_ids = torch.arange(32)[None]
    logits = merged(input_ids).logits
    torch.testing.assert_close(adapted(input_ids).logits, logits, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base / "gpt2_base").eval()
    assert not torch.allclose(plain(input_ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_frozen_heads_come_from_a_run_before(base, tmp_path):
    heads = on_base(base, tmp_path / "heads", "heads")
    site = "blocks.1.hook_resid_pre"
    run = on_base(
        base, tmp_path / "frozen", "lora_frozen_heads", heads_from=heads, hook_names=[site]
    )
    assert [path.name for path in run.glob("saes/*")] == [site]
    before, after = (
        load_file(folder / "saes" / site / "sae_weights.safetensors") for folder in (heads, run)
    )
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    (last,) = (e for e in log if "eval_compound_ce_increase" in e and e["step"] == 4)
    assert last["eval_kl_to_base"] > 0 and f"l0/{site}" in log[0]


@needs_shared_data
def test_the_official_layout_loads_whole(official):
    expected = load_file(official / "model.safetensors")
    assert "wte.weight" in expected and "lm_head.weight" not in expected
    model, tokenizer = BaseModelArguments(model_name_or_path=str(official)).load()
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (len(tokenizer), tokenizer.eos_token) == (50257, "<|endoftext|>")
    assert model.config.resid_pdrop == model.config.attn_pdrop == model.config.embd_pdrop == 0
    assert GPT2Config.from_pretrained(official).resid_pdrop == 0.1


@needs_shared_data
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gpt2_small_trains_by_its_yaml_on_a_stream_in_bf16(official, tmp_path, checkpointing):
    paragraphs = [text for text in WIKITEXT.read_text().split("\n \n") if text][:120]
    rows = "\n".join(json.dumps({"text": text}) for text in paragraphs)
    (tmp_path / "text.jsonl").write_text(rows)
    own = {"model_name_or_path": official, "dataset": tmp_path / "text.jsonl"}
    own |= {"stream_eval_blocks": 8, "gradient_checkpointing": checkpointing, "max_steps": 2}
    run = finetune(tmp_path, "gpt2_small", **own)
    figures = finished_figures(run)
    assert figures["eval_ce"] == pytest.approx(10.8, abs=0.1)  # ln 50257: nothing is learnt yet
    assert 0 < figures["kl_to_base"] < 0.1
    stock = load_file(run / "model.safetensors")
    assert stock["transformer.wte.weight"].dtype == torch.float32
    assert sorted(path.name for path in run.glob("saes/*")) == sorted(SITES)
    assert AutoTokenizer.from_pretrained(run)("a b")["input_ids"] == [64, 275]


@needs_shared_data
def test_an_interrupted_stream_goes_on_where_it_was(official, tmp_path):
    (tmp_path / "text.txt").write_text(WIKITEXT.read_text()[:60_000])
    own = {"model_name_or_path": official, "dataset": tmp_path / "text.txt"}
    own |= {"stream_eval_blocks": 4, "bf16": "false"}
    whole = finetune(tmp_path / "whole", "gpt2_small", **own)
    run = tmp_path / "again" / "run"
    run.mkdir(parents=True)
    record = json.loads((whole / "run.json").read_text())
    record["options"]["output_dir"], record["figures"] = str(run), None
    (run / "run.json").write_text(json.dumps(record))
    (whole / "checkpoint-2").rename(run / "checkpoint-2")
    finetune(tmp_path / "again", "gpt2_small", **own, resume_from_checkpoint="true")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, run))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"block_size": 64}, "block_size is 64, but the model's context is 32 tokens"),
        ({"hook_names": ["blocks.9.hook_resid_pre"]}, "Unknown hook name"),
        ({"mode": "lora", "lora_targets": ["lm_head"]}, "tied to the output layer"),
        ({"model_name_or_path": "/no/such/model"}, "/no/such/model"),
        ({"dataset": "missing.jsonl"}, "The file 'missing.jsonl' does not exist"),
    ],
)
def test_a_bad_option_is_one_sentence_and_leaves_nothing(base, tmp_path, options, sentence):
    own = {"model_name_or_path": base / "gpt2_base", "dataset": base / "text.txt"} | options
    with pytest.raises(SystemExit) as ended:
        finetune(tmp_path, "gpt2_base_joint", **own)
    assert ended.value.code.startswith("error: ") and sentence in ended.value.code
    assert not (tmp_path / "run").exists()


# ---- configurations ----


@pytest.mark.parametrize("path", sorted(RECIPES.glob("gpt2_*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_starts_with_the_command_that_runs_it(path):
    command, *_ = path.read_text().splitlines()
    launcher, recipe, config = (word for word in command.split() if word.startswith("recipes/"))
    assert command.startswith("# accelerate launch --config_file recipes/accelerate/")
    assert (REPOSITORY / launcher).is_file() and (REPOSITORY / recipe).is_file()
    assert REPOSITORY / config == path


PROCESSES = {"single": 1, "cpu_2": 2, "multi_gpu": 8, "multi_node": 16, "fsdp2": 8}


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_takes_every_launch_configuration(path):
    """It refuses keys that it does not know, but not FSDP's: these are options of the launch."""
    found = load_config_from_file(str(path))
    assert found.num_processes == PROCESSES[path.stem]
    assert vars(found).keys() >= yaml.safe_load(path.read_text()).keys()
    options = {action.dest for action in launch_command_parser()._actions}
    assert found.fsdp_config is None or found.fsdp_config.keys() <= options
