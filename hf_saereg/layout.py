"""The files of a checkpoint by name, and which of them may be published.

Notable:
- what is published is an allow-list of names: no pickle, optimizer state or run record is on it
- a file that names a folder of this machine or holds an access token is refused, and so are weights
  with NaN
"""

import json
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from hf_saereg.errors import UserError, in_one_line

HEADS_FOLDER = "saes"
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
TRAINING_FILE = "training_state.safetensors"
HEAD_FILES = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE)
HOOK_NAME = re.compile(r"blocks\.\d+\.hook_resid_(pre|post)")

MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
TRAINING_RECORD = "training.json"
CARD = "README.md"
FIGURES = "figures"
MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PUBLISHED = (
    MODEL_CONFIG,
    GENERATION_CONFIG,
    *MODEL_WEIGHTS,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    TRAINING_RECORD,
    CARD,
    "LICENSE",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# of the files in JSON these may hold a path; the others are vocabulary
CONFIGURATIONS = (
    MODEL_CONFIG,
    GENERATION_CONFIG,
    ADAPTER_CONFIG,
    TOKENIZER_CONFIG,
    TRAINING_RECORD,
)

METADATA = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)  # of a card, in YAML
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


class PublishingError(UserError):
    """A folder may not be published; the message says why."""


def published_files(folder: Path) -> list[str]:
    """What may be published, sorted: names with forward slashes, relative to the folder.

    Args:
        folder: of a checkpoint; need not exist.
    """
    patterns = ("*", f"{HEADS_FOLDER}/*/*", f"{FIGURES}/*")
    names = [
        path.relative_to(folder).as_posix()
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file()
    ]
    return sorted(filter(is_published, names))


def is_published(name: str) -> bool:
    """Whether a file of this name, relative to its checkpoint, is on the allow-list."""
    match name.split("/"):
        case [file]:
            return any(fnmatchcase(file, pattern) for pattern in PUBLISHED)
        case [top, file]:
            return top == FIGURES and file.endswith(".png")
        case [top, hook_name, file]:
            is_head = HOOK_NAME.fullmatch(hook_name) is not None
            return top == HEADS_FOLDER and is_head and file in HEAD_FILES
    return False


def check_publishable(folder: Path, token: str | None = None) -> None:
    """Check that a folder holds a checkpoint, and that its files may be published.

    Args:
        folder: of a checkpoint.
        token: must not be in any file.

    Raises:
        PublishingError: if there is no model or adapter, a file is damaged, weights are not finite,
            a text holds a token or a path of this machine, or an adapter's base is a folder here.
    """
    if not folder.is_dir():
        raise PublishingError(
            f"There is no folder {folder}; name the one that a model was saved to."
        )
    names = published_files(folder)
    if not {MODEL_CONFIG, ADAPTER_CONFIG} & set(names):
        raise PublishingError(
            f"{folder} holds no checkpoint ({MODEL_CONFIG} and model.safetensors); name the folder "
            "that a model was saved to."
        )
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        never = f" (pickles, such as {pickles[0]}, are never published)" if pickles else ""
        raise PublishingError(
            f"{folder} has no weights in safetensors{never}; save the model there first."
        )
    check_files(folder, names, token)
    if ADAPTER_CONFIG in names:
        check_base(json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])


def check_base(name: str | None) -> None:
    """Check that others can load what an adapter is made for.

    Args:
        name: of the base, as the adapter's configuration has it.

    Raises:
        PublishingError: if it is a folder of this machine.
    """
    if name and Path(name).exists():
        raise PublishingError(
            f"The base of the adapter is {name!r}, a folder of this machine, which others would "
            "take for a repository of that name: push the base first, and adapt it under its name "
            "on the Hub."
        )


def check_files(folder: Path, names: Iterable[str], token: str | None = None) -> None:
    """Check that files may be published.

    Args:
        folder: of a checkpoint.
        names: of files in it that are on the allow-list.
        token: must not be in any of them.

    Raises:
        PublishingError: if a file is damaged, weights are not finite, or a text holds a token or a
            path of this machine.
    """
    for name in names:
        path = folder / name
        if name.endswith(".safetensors"):
            _check_finite(path)
        elif path.name == CONFIG_FILE or name in (*CONFIGURATIONS, CARD):
            _check_text(path, token)


def _check_finite(path: Path) -> None:
    try:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not tensors.get_tensor(name).isfinite().all():
                    raise PublishingError(
                        f"{path} has NaN or infinity in {name}; only sound weights are published."
                    )
    except SafetensorError as error:
        raise PublishingError(f"{path} is damaged ({error}); save the model again.") from error


def _check_text(path: Path, token: str | None) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == CARD:
            found = _home_or_here(text)
            yaml.safe_load(metadata[1] if (metadata := METADATA.match(text)) else "")
        else:
            found = local_paths(json.loads(text))
    except (ValueError, yaml.YAMLError) as error:
        said = in_one_line(error)
        raise PublishingError(f"{path} is damaged ({said}); mend it or save anew.") from error
    if TOKEN.search(text) or (token and token in text):
        raise PublishingError(f"{path} holds an access token; take it out before publishing.")
    for local in found:
        raise PublishingError(
            f"{path} names {local!r}, a path of this machine; put a name in its place that others "
            "can use."
        )


def _home_or_here(text: str) -> list[str]:
    folders = {str(Path.home()), str(Path.cwd())} - {"/"}
    return [folder for folder in folders if re.search(rf"{re.escape(folder)}\b", text)]


def local_paths(content: Any) -> Iterator[str]:
    """The absolute paths among the values of something read from JSON."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from local_paths(value)
    elif isinstance(content, str) and is_local_path(content):
        yield content


def is_local_path(text: str) -> bool:
    """Whether a text is an absolute path; `/s`, a token of some vocabularies, is none."""
    return any(
        path.is_absolute() and len(path.parts) > 2
        for path in (PurePosixPath(text), PureWindowsPath(text))
    )


def without_folder(value: Any) -> Any:
    """Of an absolute path the last name; anything else as it is, the values of a mapping too."""
    if isinstance(value, dict):
        return {name: without_folder(part) for name, part in value.items()}
    if not isinstance(value, str) or not is_local_path(value):
        return value
    return (PureWindowsPath if "\\" in value else PurePosixPath)(value).name
