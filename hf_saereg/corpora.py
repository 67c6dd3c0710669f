"""Text in, fixed-length blocks out; the character tokenizer.

    text -> documents -> token ids -> first part | rest -> blocks of `block_size` ids

What is notable:

- The split is by position in the sequence of tokens, and the blocks follow the order of the text,
  without overlap or padding. Documents are joined as they are, or with the tokenizer's end-of-text
  token between them; there is no other special token.
- Of a stream the first blocks validate, and are kept in memory; the others train.
- A long document is tokenised in pieces: what a tokenizer returns beside the ids is a hundred times
  the size of the text. It is cut where the ids stay what they are, or not at all.
- The text is tokenised once. `datasets` keeps the ids on disk under a fingerprint of the text's
  content and of the tokenizer; a later call, also from another process, reads them back.
- Any tokenizer will do. Ours has one token for each ASCII character, with the character's code as
  its id, so that a model small enough for a laptop spends no parameters on a vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_saereg.documents import CorpusArguments, CorpusError, load_documents, stream_documents

UNKNOWN = "?"
PADDING = "\0"
STREAM_EVAL_BLOCKS = 256
DOCUMENTS_AT_ONCE = 8
PIECES_AT_ONCE = 8  # a piece is a short document, or a part of a long one
PIECE_CHARACTERS = 2**16  # at least, where there is more; the encodings of 8 take some 60 MB
# GPT-2's tokenizer takes the last space of several apart from those before it: in front of that it
# can be cut, behind it not
SEAM = re.compile(r"\s(?=\S)")
MOST_TOKENS = 2**31 - 1  # of a text that is read whole: Arrow counts those of a column in 32 bits
SEAM_CONTEXT = 100  # characters on either side of a seam that tell whether it changes the ids

Blocks = dict[str, Dataset | IterableDataset]  # `train` and `validation`
T = TypeVar("T")


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
        CorpusError: if the corpus cannot be had or is a stream, has more than `MOST_TOKENS`, or a
            split is shorter than a block.
    """
    if arguments.stream:
        raise CorpusError(
            "The text is to be read whole here, and cannot be a stream; leave stream out."
        )
    documents = load_documents(arguments)
    tokens = documents.map(
        _tokenize_documents,
        batched=True,
        batch_size=DOCUMENTS_AT_ONCE,
        remove_columns=["text"],
        features=Features({"input_ids": List(Value("int32"))}),
        fn_kwargs={"tokenizer": tokenizer, "end": _end_of_document(arguments, tokenizer)},
        desc="Tokenising",
    ).with_format("arrow")
    n_tokens = pc.sum(pc.list_value_length(tokens[:]["input_ids"]), min_count=0).as_py()
    _check_number(n_tokens)
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


def stream_blocks(arguments: CorpusArguments, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """The same of a stream: `validation` in memory, `train` read when it is asked for.

    Args:
        arguments: which text; the first `stream_eval_blocks` blocks validate.
        tokenizer: as `load_blocks` takes it.

    Raises:
        CorpusError: if the corpus cannot be had, or is too short.
    """
    end = _end_of_document(arguments, tokenizer)
    features = Features({"input_ids": List(Value("int32"), arguments.block_size)})
    stream = IterableDataset.from_generator(
        _packed,
        features=features,
        gen_kwargs={"arguments": arguments, "tokenizer": tokenizer, "end": end},
    )
    number = arguments.stream_eval_blocks or STREAM_EVAL_BLOCKS
    first = first_rows(stream, number + 1)
    if len(first) <= number:
        raise CorpusError(
            f"'{arguments.dataset}' gives {len(first)} blocks of {arguments.block_size} tokens, "
            f"and the first {number} validate: take a longer text, or lower stream_eval_blocks."
        )
    validation = Dataset.from_list(first[:number], features=features)
    # without end: Trainer takes a stream for one epoch, and resumes within it
    return {"train": stream.skip(number).repeat(None), "validation": validation}


def _packed(
    arguments: CorpusArguments, tokenizer: PreTrainedTokenizerBase, end: list[int]
) -> Iterator[dict[str, list[int]]]:
    ids, size = [], arguments.block_size
    for some in _token_ids(stream_documents(arguments), tokenizer, end):
        ids += some
        whole = len(ids) - len(ids) % size
        yield from ({"input_ids": ids[i : i + size]} for i in range(0, whole, size))
        ids = ids[whole:]


def first_rows(rows: Iterable[T], number: int) -> list[T]:
    """The first rows of a dataset or a stream, or all if there are fewer."""
    return list(islice(rows, number))


def _end_of_document(arguments: CorpusArguments, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not arguments.join_with_eos:
        return []
    if tokenizer.eos_token_id is None:
        raise CorpusError(
            "join_with_eos needs a tokenizer with an end-of-text token, and this one has none; "
            "leave join_with_eos out."
        )
    return [tokenizer.eos_token_id]


def _tokenize_documents(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, end: list[int]
) -> dict[str, list[np.ndarray]]:
    """A row for each piece of the documents; an array takes a tenth of a list's memory."""
    parts, number = [], 0
    for ids in _token_ids(batch["text"], tokenizer, end):
        parts.append(np.array(ids, dtype=np.int32))
        number += len(ids)
        _check_number(number)
    return {"input_ids": parts}


def _check_number(tokens: int) -> None:
    if tokens > MOST_TOKENS:
        raise CorpusError(
            f"The text has more than {MOST_TOKENS:,} tokens, too many to be cut into blocks as a "
            "whole: add stream, or take a part of it by max_characters or text_share."
        )


def _token_ids(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, end: list[int]
) -> Iterator[list[int]]:
    """The ids of all documents in order, piece by piece."""
    pieces = _pieces(documents, tokenizer)
    while some := list(islice(pieces, PIECES_AT_ONCE)):
        encoded = _tokenize([text for text, _ in some], tokenizer)
        for ids, (_, is_last) in zip(encoded, some, strict=True):
            yield ids + end if is_last else ids


def _pieces(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """Documents, the long ones in pieces, each with whether it is the last of its document."""
    for text in documents:
        start = 0
        for stop in _seams(text, tokenizer):
            yield text[start:stop], False
            start = stop
        yield text[start:], True


def _seams(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Where a text can be cut, so that the ids of its parts are those of the whole."""
    position = PIECE_CHARACTERS
    while seam := SEAM.search(text, position):
        middle = seam.start()
        before = text[max(0, middle - SEAM_CONTEXT) : middle]
        after = text[middle : middle + SEAM_CONTEXT]
        whole, first, second = _tokenize([before + after, before, after], tokenizer)
        if whole == first + second:
            yield middle
        position = middle + PIECE_CHARACTERS


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a text may well be longer than model_max_length
    )["input_ids"]


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
