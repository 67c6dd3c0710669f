"""Options: a file for the defaults, the command line over it, and errors that help."""

import json
from dataclasses import dataclass, field
from enum import Enum

import pytest

from hf_saereg.errors import UserError
from hf_saereg.options import OptionsError, as_record, parse_options
from hf_saereg.processes import PATIENCE
from hf_saereg.trainer import SAERegArguments


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Shape:
    width: int = 8
    weights: list[float] = field(default_factory=lambda: [1.0])
    names: list[str] | None = None
    wide: bool = False
    smooth: bool = True
    colour: Colour = Colour.RED


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "options.yaml").write_text(text)
        return ["--config", str(tmp_path / "options.yaml")]

    return write


def parse(*words, also=()):
    return parse_options(SAERegArguments, Shape, *also, arguments=[*words])


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(file):
    words = file("width: 16\nmax_steps: 5\nweights: [1, 2]\nnames: [a, b]\n")
    arguments, shape = parse("--width", "32", *words, "--weights", "3", "4", "5")
    assert (shape.width, arguments.max_steps) == (32, 5)
    assert shape.weights == [3.0, 4.0, 5.0]
    assert shape.names == ["a", "b"]
    assert shape.colour == Colour.RED


def test_no_process_gives_up_on_one_that_tokenises():
    """That of `TrainingArguments` does after half an hour, inside `main_process_first`."""
    (arguments, _) = parse()
    assert arguments.ddp_timeout_delta == PATIENCE
    (arguments, _) = parse("--ddp_timeout", "60")
    assert arguments.ddp_timeout_delta.total_seconds() == 60


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'1e-3'", "1E-3"])
def test_a_float_may_be_written_in_any_way(file, text):
    arguments, shape = parse(*file(f"learning_rate: {text}\nweights: [{text}, 2]\n"))
    assert arguments.learning_rate == 1e-3
    assert shape.weights == [1e-3, 2.0]


@pytest.mark.parametrize(
    "words, wide, smooth",
    [
        ([], False, True),
        (["--wide"], True, True),
        (["--wide", "true", "--smooth", "false"], True, False),
        (["--no_smooth"], False, False),
    ],
)
def test_booleans_on_the_command_line(words, wide, smooth):
    shape = parse(*words)[1]
    assert (shape.wide, shape.smooth) == (wide, smooth)


def test_booleans_in_the_file_and_over_it(file):
    words = file("wide: true\nsmooth: false\n")
    assert (parse(*words)[1].wide, parse(*words)[1].smooth) == (True, False)
    assert parse(*words, "--wide", "false")[1].wide is False


def test_one_value_stands_for_a_list_and_null_for_the_default(file):
    shape = parse(*file("weights: 2\nnames: null\nwidth: null\n"))[1]
    assert (shape.weights, shape.names, shape.width) == ([2.0], None, 8)


def test_a_mapping_reaches_the_scheduler(file):
    arguments = parse(*file("lr_scheduler_kwargs: {min_lr: 1.0e-5}\n"))[0]
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_reports_go_to_several_places(file):
    assert parse(*file("report_to: [tensorboard, wandb]\n"))[0].report_to == [
        "tensorboard",
        "wandb",
    ]
    assert parse()[0].report_to == ["tensorboard"]
    assert parse("--report_to", "none")[0].report_to == []


@pytest.mark.parametrize(
    "text, hint",
    [
        ("max_stesp: 3", "Unknown option 'max_stesp' in .*yaml; did you mean 'max_steps'"),
        ("widht: 3", "did you mean 'width'"),
        ("7: 3", "Unknown option '7'"),
        ("true: 3", "Unknown option 'True'"),
        ("width: [", "is no valid YAML"),
        ("\x00", "is no valid YAML"),
        ("- width", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("width: wide", "--width: invalid int value: 'wide'"),
        ("max_steps: 1.5", "invalid int value: '1.5'"),
        ("weights: [1, heavy]", "--weights: invalid float value: 'heavy'"),
        ("weights: []", "--weights: expected at least one argument"),
        ("wide: perhaps", "--wide: Truthy value expected"),
        ("colour: green", "colour: invalid choice: 'green'"),
        ("eval_strategy: sometimes", "invalid choice: 'sometimes'"),
        ("lr_scheduler_type: sometimes", "sometimes"),
        ("width: 3\nwidth: [3\n", "got '<stream end>' in .*, line 3"),
        ("load_best_model_at_end: true", "requires the save and eval strategy to match"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_error(file, text, hint):
    with pytest.raises(OptionsError, match=hint) as caught:
        parse(*file(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, hint",
    [
        (["--max_stesp", "3"], "'max_stesp' in the command line; did you mean 'max_steps'"),
        (["--max_stesp=3"], "did you mean 'max_steps'"),
        (["--max_step", "3"], "did you mean 'max_steps'"),  # no abbreviations
        (["--width", "wide"], "--width: invalid int value"),
        (["--width"], "--width: expected one argument"),
        (["stray"], "Cannot make sense of 'stray'"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "Cannot read the configuration nowhere.yaml: No such file"),
        (["--config", "."], "Cannot read the configuration .: Is a directory"),
    ],
)
def test_a_command_line_that_cannot_be_used_is_named_in_one_error(words, hint):
    with pytest.raises(OptionsError, match=hint):
        parse(*words)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "options.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionsError, match="is no valid YAML"):
        parse("--config", str(tmp_path / "options.yaml"))


def test_an_option_class_states_its_own_errors():
    class RangeError(UserError):
        pass

    @dataclass
    class Narrow:
        height: int = 1

        def __post_init__(self):
            if self.height < 1:
                raise RangeError("height is too small")

    with pytest.raises(RangeError, match=r"^height is too small$"):
        parse("--height", "-1", also=[Narrow])


def test_the_record_is_json_and_holds_every_option(file):
    words = file("lr_scheduler_kwargs: {min_lr: 1.0e-5}\nweights: [1, 2]\ncolour: blue\n")
    record = json.loads(json.dumps(as_record(parse(*words))))
    assert record["weights"] == [1.0, 2.0]
    assert record["colour"] == "blue"
    assert record["lr_scheduler_kwargs"] == "{'min_lr': 1e-05}"
    assert {"learning_rate", "kernel", "seed", "width"} <= record.keys()


def test_the_record_holds_no_token():
    parsed = parse("--hub_token", "hf_secret")
    assert parsed[0].hub_token == "hf_secret"
    assert "hf_secret" not in json.dumps(as_record(parsed))
