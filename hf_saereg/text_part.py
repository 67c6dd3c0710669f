"""A part of a text: the documents, or parts of documents, between two of its characters.

Notable:
- of rows on disk only the part is read, and to find it no more than their lengths, which end at the
  last character that is asked for
- an empty document belongs to the part that it lies in, and is kept there
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

ROWS_AT_ONCE = 100


def bounds(
    lengths: Iterable[int], share: Sequence[float] | None, max_characters: int | None
) -> tuple[int, int | None]:
    """The first character that is read, and the first that is not any more; None for no end.

    Args:
        lengths: of all documents, in characters; asked for only where there is a share.
        share: of all characters, where the part begins and ends.
        max_characters: of the part.
    """
    start, stop = 0, None
    if share is not None:
        total = sum(lengths)
        start, stop = (int(end * total) for end in share)
    if max_characters is not None:
        limit = start + max_characters
        stop = limit if stop is None else min(stop, limit)
    return start, stop


def characters_between(
    documents: Iterable[str], start: int, stop: int | None
) -> Iterator[dict[str, str]]:
    """Rows with the `text` of the documents between two characters.

    Args:
        documents: read in order, and no further than need be.
        start: first character, counted over all documents.
        stop: first character that is left out; None for no end.
    """
    position = 0  # of a document's first character among all of them
    for text in documents:
        if stop is not None and position >= stop:
            return
        part = text[max(0, start - position) : None if stop is None else stop - position]
        if part or (not text and position >= start):
            yield {"text": part}
        position += len(text)


def row_lengths(rows: Dataset) -> Iterator[np.ndarray]:
    """Characters of each document, some rows at a time; no text is kept.

    Args:
        rows: with a column `text`.
    """
    for some in rows.data.column("text").chunks:
        yield pc.utf8_length(some).to_numpy(zero_copy_only=False).astype(np.int64)


def rows_between(rows: Dataset, start: int, stop: int | None) -> Dataset:
    """What `characters_between` gives of the same documents, as rows.

    Args:
        rows: with a column `text`.
        start: first character, counted over all documents.
        stop: first character that is left out; None for no end.
    """
    lengths, total = [], 0
    for some in row_lengths(rows):
        lengths.append(some)
        total += int(some.sum())
        if stop is not None and total >= stop:
            break
    ends = np.concatenate(lengths).cumsum()
    begins = ends - np.concatenate(lengths)  # of the first character among all of them
    first = min(np.searchsorted(ends, start, side="right"), np.searchsorted(begins, start))
    behind = len(ends) if stop is None else np.searchsorted(begins, stop)
    if first == behind:
        return rows.select([])
    return rows.select(range(first, behind)).map(
        _cut_ends,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        with_indices=True,
        fn_kwargs={
            "skip": max(0, start - int(begins[first])),
            "last": int(behind - first - 1),
            "keep": None if stop is None else stop - int(begins[behind - 1]),
        },
        desc="Taking a part of the text",
    )


def _cut_ends(
    batch: dict[str, list[str]], indices: list[int], skip: int, last: int, keep: int | None
) -> dict[str, list[str]]:
    texts = list(batch["text"])
    if indices[-1] == last:
        texts[-1] = texts[-1][:keep]
    if indices[0] == 0:
        texts[0] = texts[0][skip:]
    return {"text": texts}
