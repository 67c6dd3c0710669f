"""The section of a page about what `saereg quality` measured, in words and tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hf_saereg.report.findings import listed
from hf_saereg.report.layout import Caption
from hf_saereg.report.measured import (
    Line,
    MeasuredModel,
    lines,
    measures,
    read_measured,
    shown_groups,
)

LACKING = {
    "matched": "consistency across seeds, which needs two seeds of a cell",
    "explained_1": "composition, which needs two values of d_sae",
    "f1_vowel": "probes of characters, which need a tokenizer with one token a character",
}


class Table(NamedTuple):
    """One table of the section.

    Attributes:
        title: its caption.
        columns: titles by measure.
        lines: those that have a value in any column.
    """

    title: str
    columns: dict[str, str]
    lines: list[Line]


class QualitySection(NamedTuple):
    """All that the section shows but its figure.

    Attributes:
        models: measured.
        tables: of all heads.
        lacking: what could not be measured, and why, in one sentence; None if nothing.
        texts: what was read, a model each.
        commands: that measured it.
        caption: of the figure.
    """

    models: list[MeasuredModel]
    tables: list[Table]
    lacking: str | None
    texts: list[str]
    commands: list[str]
    caption: Caption


def quality_section(folders: Sequence[Path]) -> QualitySection | None:
    """The section of the runs; None where none of them was measured.

    Args:
        folders: of runs.

    Raises:
        ReportError: if a `quality.json` is damaged or lacks a key.
    """
    models = read_measured(folders)
    if not models:
        return None
    titles = {name: measure.title for name, measure in measures(models).items()}
    found = lines(models)
    missing = [
        why for name, why in LACKING.items() if all(line.values.get(name) is None for line in found)
    ]
    kinds = {
        "Directions": ("matched", "explained_"),
        "Firing together": ("excess", "lifted"),
        "One latent as a probe": ("f1_",),
    }
    tables = [_table(title, titles, prefixes, found) for title, prefixes in kinds.items()]
    return QualitySection(
        models,
        [table for table in tables if table.lines],
        f"Not measured: {listed(missing)}." if missing else None,
        [
            f"{own.run.setup.tokens[own.name]:,} tokens of {own.run.setup.dataset} for {own.label}"
            for own in models
        ],
        list(dict.fromkeys(own.run.setup.command for own in models)),
        Caption(
            "What the latents of fresh SAEs stand for, site by site",
            "Thin lines: by chance, as explained below.",
            _description(models),
        ),
    )


def _table(
    title: str, titles: dict[str, str], prefixes: tuple[str, ...], found: list[Line]
) -> Table:
    columns = {name: own for name, own in titles.items() if name.startswith(prefixes)}
    kept = [line for line in found if any(line.values[name] is not None for name in columns)]
    return Table(title, columns, kept)


def _description(models: Sequence[MeasuredModel]) -> str:
    sentences = []
    for group in shown_groups(models):
        parts = []
        for measure in measures(models).values():
            means = [(own.label, measure.mean(own, group)) for own in models]
            known = [f"{mean:.3f} on {label}" for label, mean in means if mean is not None]
            if known:
                parts.append(f"{measure.title} {listed(known)}")
        sentences.append(f"{group.label}: {'; '.join(parts)}")
    return f"A panel a measure. Means over sites: {'. '.join(sentences)}."
