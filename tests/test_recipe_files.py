"""Every YAML file in recipes/ is read by the command that its first line names."""

import importlib.util
import re

import pytest
import yaml
from conftest import REPOSITORY

from hf_saereg.character import OPTION_CLASSES
from hf_saereg.commands.sweep import SweepArguments, TextArguments
from hf_saereg.options import parse_options
from hf_saereg.study import Study
from hf_saereg.study_settings import settings_of

RECIPES = REPOSITORY / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
STUDIES = [path for path in FILES if "variants:" in path.read_text()]


def option_classes(command):
    """Of the script or subcommand that a command runs."""
    script = re.search(r"recipes/(\w+)\.py", command)
    if script is None:
        assert command.startswith("# saereg sweep ")
        return SweepArguments, TextArguments
    if script[1] in ("train_character", "study_character"):
        return OPTION_CLASSES
    path = RECIPES / f"{script[1]}.py"
    spec = importlib.util.spec_from_file_location(script[1], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OPTION_CLASSES


@pytest.mark.parametrize(
    "path", [path for path in FILES if path not in STUDIES], ids=lambda p: p.stem
)
def test_options_are_those_of_the_command_named_first(path, tmp_path):
    command = next(line for line in path.read_text().splitlines() if "recipes/" in line)
    assert path.name in command or path.stem == "character_study"
    words = ["--config", str(path)]
    words += [] if "--output_dir" in command else ["--output_dir", str(tmp_path)]
    if "saereg sweep" in command:
        words += ["--model", "any", "--output_dir", str(tmp_path)]
    if "bf16: true" in path.read_text():  # made for GPUs
        words += ["--use_cpu", "true"]
    parse_options(*option_classes(command), arguments=words)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_have_usable_variants(path):
    study = Study.read(path)
    assert settings_of(study).keys() == study.variants.keys()
    assert str(path.relative_to(REPOSITORY)) in path.read_text().splitlines()[0]


def test_published_training_has_the_settings_of_the_post():
    settings = yaml.safe_load((RECIPES / "character_published.yaml").read_text())
    post = {
        **{"block_size": 128, "train_fraction": 0.9, "n_layer": 4, "n_head": 4, "n_embd": 64},
        **{"dropout": 0.0, "architecture": "standard", "d_sae": [512, 512, 2048, 4096, 4096]},
        **{"sparsity_coefficient": [0.020, 0.035, 0.085, 0.070, 0.075]},
        **{"reconstruction_weight": [3.0], "max_steps": 15000, "per_device_train_batch_size": 128},
        **{"train_sampling_strategy": "sequential", "learning_rate": 1e-3, "warmup_steps": 750},
        **{"plain_warmup_steps": 1000, "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        **{"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0},
        **{"bf16": True, "eval_steps": 250, "load_best_model_at_end": True},
        **{"metric_for_best_model": "objective", "fresh_steps": 7500, "fresh_warmup_steps": 750},
    }
    assert {name: settings[name] for name in post} == post
