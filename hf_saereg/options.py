"""Options of a recipe: a YAML file for the defaults, the command line over it.

Notable:
- the options are dataclasses, read by `HfArgumentParser`; the file is flat, one key an option, and
  is read as if its options stood on the command line, so that types are checked alike; `null`
  leaves an option at its default
- a key that no option has is an error that names the nearest one, in the file as on the line
"""

import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_saereg.errors import UserError, in_one_line


class OptionsError(UserError):
    """The options of a recipe cannot be used; the message says why."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionsError(f"Cannot use the options: {message}.")


def parse_options(*classes: type, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read options from the file named by `--config`, overridden by the command line.

    Args:
        *classes: dataclasses, as `HfArgumentParser` takes them.
        arguments: command line without the program; `sys.argv[1:]` by default.

    Returns:
        One instance of each class.

    Raises:
        OptionsError: if the file is missing or no mapping, or an option is unknown or has a value
            that it cannot have.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(classes, allow_abbrev=False)
    names = {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}
    config = _Parser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path, help="YAML file with any of the options below")
    found, arguments = config.parse_known_args(arguments)
    parser.epilog = "--config FILE reads any of these options from a YAML file."
    if found.config is not None:
        options = _read_yaml(found.config)
        _check_known(list(options), names, str(found.config))
        arguments = [*as_words(options), *arguments]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except ValueError as error:  # of `TrainingArguments`
        raise OptionsError(f"Cannot use the options: {in_one_line(error)}") from error
    flags = [word.split("=")[0].lstrip("-") for word in unknown if word.startswith("--")]
    _check_known(flags, names, "the command line")
    if unknown:
        raise OptionsError(f"Cannot make sense of {' '.join(unknown)!r} on the command line.")
    return tuple(parsed)


def as_record(options: Sequence[Any]) -> dict[str, Any]:
    """All options as one JSON-serialisable dictionary, as `run.json` keeps them.

    Args:
        options: instances of option dataclasses; secrets of `TrainingArguments` are masked by it.
    """
    record: dict[str, Any] = {}
    for instance in options:
        # that of `TrainingArguments`, which take seconds to import
        sanitized = getattr(instance, "to_sanitized_dict", None)
        record |= sanitized() if sanitized else dataclasses.asdict(instance)
    return {
        name: value.value if isinstance(value, Enum) else value for name, value in record.items()
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:  # whose errors name it, and quote nothing of it
            options = yaml.safe_load(file)
    except OSError as error:
        raise OptionsError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionsError(f"{path} is no valid YAML: {in_one_line(error)}.") from error
    if not isinstance(options, dict):
        raise OptionsError(f"{path} must hold a mapping of option names to values.")
    return options


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line; `None` leaves an option at its default."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else value
            words.append(f"--{name}={text}")
    return words


def _check_known(keys: Sequence[Any], names: set[str], source: str) -> None:
    for key in map(str, keys):
        if key.removeprefix("no_") not in names:
            nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise OptionsError(f"Unknown option {key!r} in {source}; did you mean {nearest!r}?")
