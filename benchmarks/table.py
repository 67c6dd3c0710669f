"""The figures of `benchmarks.step` as text: for a terminal, and as the table of the README.

    python -m benchmarks.table benchmarks/results/*.json

Files that other commands wrote are passed over.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_saereg.errors import UserError, one_sentence_errors

COLUMNS = (
    "shape, stage",
    "tokens",
    "L0",
    "plain, tokens/s",
    "ours, tokens/s",
    "time ÷ plain",
    "÷ (plain + products)",
    "speed ÷ naive",
    "memory ÷ plain",
)


def text(results: dict[str, Any]) -> str:
    """All paths of one file, for a terminal.

    Args:
        results: as `benchmarks.step` writes them.
    """
    lines = [_conditions(results)]
    for stage, measured in results["stages"].items():
        l0s = " ".join(f"{site['l0']:.0f}/{site['d_sae']}" for site in measured["sites"].values())
        lines.append(f"\n{stage} (L0 {l0s})")
        lines.append("  path      tokens/s   × plain   × floor   over naive   memory × plain")
        for path, figures in measured["paths"].items():
            memory = figures["peak_memory_ratio_to_plain"]
            lines.append(
                f"  {path:<8} {figures['tokens_per_second']:>9,.0f} "
                f"{figures['ratio_to_plain']:>9.2f} {figures['ratio_to_floor']:>9.2f} "
                f"{figures['speedup_over_naive']:>12.2f} "
                f"{'–' if memory is None else f'{memory:.2f}':>16}"
            )
    return "\n".join([*lines, *_doubling(results)])


def markdown(files: list[dict[str, Any]]) -> str:
    """A row a stage for our default path, and below it under which conditions.

    Args:
        files: contents of files that `benchmarks.step` wrote.
    """
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    for results in files:
        for stage, measured in results["stages"].items():
            plain, ours = measured["paths"]["plain"], measured["paths"]["auto"]
            l0s = [site["l0"] for site in measured["sites"].values()]
            cells = (
                f"{results['shape']}, {stage}",
                f"{results['tokens']:,}",
                f"{min(l0s):.0f}–{max(l0s):.0f}",
                f"{plain['tokens_per_second']:,.0f}",
                f"{ours['tokens_per_second']:,.0f}",
                f"{ours['ratio_to_plain']:.2f}",
                f"{ours['ratio_to_floor']:.2f}",
                f"{ours['speedup_over_naive']:.1f}",
                f"{ours['peak_memory_ratio_to_plain']:.2f}",
            )
            lines.append(_row(cells))
    notes = [note for results in files for note in (_conditions(results), *_doubling(results))]
    return "\n".join([*lines, "", *(f"- {note.strip()}" for note in notes)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _conditions(results: dict[str, Any]) -> str:
    return (
        f"{results['shape']}: {results['tokens']} tokens, {results['precision']}, "
        f"{results['threads']} threads, {results['device']}, medians of {results['repeats']}"
    )


def _doubling(results: dict[str, Any]) -> list[str]:
    doubling = results.get("scaling", {}).get("doubling")
    if doubling is None:
        return []
    before, after = (f"{head['d_sae']:,} (L0 {head['l0']:.1f})" for head in doubling["heads"])
    costs = ", ".join(
        f"{path} {cost:.2f}"
        for path, cost in doubling["added_over_product"].items()
        if path != "product"
    )
    return [
        f"\n{results['shape']}: d_sae {before} → {after} adds, × what the encoder product adds "
        f"(medians of {doubling['turns']}): {costs}"
    ]


def main() -> None:
    """Print the table.

    Raises:
        UserError: if no file holds figures of `benchmarks.step`.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="what benchmarks.step wrote")
    contents = [json.loads(file.read_text()) for file in parser.parse_args().files]
    files = [results for results in contents if "stages" in results]
    if not files:
        raise UserError("None of the files holds figures of benchmarks.step; name one that it "
                        "wrote, as benchmarks/results/published.json.")  # fmt: skip
    print(markdown(files))


if __name__ == "__main__":
    with one_sentence_errors():
        main()
