"""Every YAML file in recipes/ is read by the command that its first line names."""

import importlib.util
import re

import pytest
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
