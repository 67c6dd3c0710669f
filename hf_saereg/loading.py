"""Any GPT-2 checkpoint, ours or not, with the tokenizer that it was trained with.

Notable:
- what the folder says decides: nothing stands in for a file that is missing, but one; the tokenizer
  of characters, for a model without tokenizer files whose vocabulary is exactly its 128 tokens
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerBase

from hf_saereg.checkpoint import CheckpointError
from hf_saereg.corpora import character_tokenizer
from hf_saereg.modeling import SAERegGPT2LMHeadModel

CHARACTERS = "characters"
CHARACTER_VOCABULARY = 128
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def load_checkpoint(
    name: str, tokenizer: str | None = None, **options: Any
) -> tuple[SAERegGPT2LMHeadModel, PreTrainedTokenizerBase]:
    """A GPT-2 in single precision, with its heads if it has some, and its tokenizer.

    Args:
        name: folder or Hub repository.
        tokenizer: folder or Hub repository of another tokenizer, or `characters`.
        **options: as `SAERegGPT2LMHeadModel.from_pretrained` takes them.

    Raises:
        UserError: if it is not there, no GPT-2, damaged or incomplete, or there is no tokenizer.
    """
    model = SAERegGPT2LMHeadModel.load_whole(name, dtype=torch.float32, **options)
    return model.eval(), _tokenizer(name, tokenizer, model.config)


def fingerprint(model: SAERegGPT2LMHeadModel) -> str:
    """SHA-256 of the language model's weights and of its heads', to know it again by."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tokenizer(path: str, other: str | None, config: GPT2Config) -> PreTrainedTokenizerBase:
    source = path if other is None else other
    folder = Path(source).expanduser()
    if source == CHARACTERS:
        tokenizer = character_tokenizer(config.n_positions)
    elif folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        tokenizer = _characters_or_none(source, config)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"The tokenizer of {source} cannot be loaded ({_first_line(error)}); name another "
                f"with --tokenizer, a folder, a Hub repository or {CHARACTERS}."
            ) from error
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, but the model knows "
            f"{config.vocab_size}; name the one that it was trained with by --tokenizer."
        )
    return tokenizer


def _characters_or_none(source: str, config: GPT2Config) -> PreTrainedTokenizerBase:
    if config.vocab_size != CHARACTER_VOCABULARY:
        raise CheckpointError(
            f"{source} holds no tokenizer, and its vocabulary of {config.vocab_size} is not that "
            f"of the character tokenizer ({CHARACTER_VOCABULARY}); name one with --tokenizer, a "
            "folder or a Hub repository."
        )
    return character_tokenizer(config.n_positions)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
