"""A study's finished cells as one table: a line a variant, means over seeds.

Notable:
- it needs no interval and no plotting; what compares variants with intervals is `hf_saereg.report`
"""

import statistics
from typing import Any

from hf_saereg.scores import effective_rank


def table(cells: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One row a variant: means over seeds, and mean differences from the baseline.

    Args:
        cells: contents of finished cells; those of seeds that the baseline lacks are left out.
        baseline: the variant that the others are compared with.

    Returns:
        Rows with `variant`, `seeds`, `eval_ce`, `relative_time` (of training, against the
        baseline), `norms` and `effective_ranks` a site, and per fresh grid point `NAME`: its
        compound CE increase, Σ L0 and CE increase a site.
    """
    first = {cell["seed"]: cell for cell in cells if cell["variant"] == baseline}
    paired: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["seed"] in first:
            paired.setdefault(cell["variant"], []).append(cell)
    return [_row(own, first) for own in paired.values()]


def _row(cells: list[dict[str, Any]], first: dict[int, dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": cells[0]["variant"], "seeds": [c["seed"] for c in cells]}
    row["eval_ce"] = [c["figures"]["eval_ce"] for c in cells]
    row["ce_cost"] = [
        c["figures"]["eval_ce"] - first[c["seed"]]["figures"]["eval_ce"] for c in cells
    ]
    row["relative_time"] = statistics.mean(
        c["figures"]["train_seconds"] / first[c["seed"]]["figures"]["train_seconds"] for c in cells
    )
    bases = [c["scores"]["baselines"] for c in cells]
    sites = bases[0]["residual_norm"]
    row["norms"] = [statistics.mean(b["residual_norm"][site] for b in bases) for site in sites]
    row["effective_ranks"] = [
        statistics.mean(effective_rank(b["spectrum"][site]) for b in bases) for site in sites
    ]
    row["compound"] = {
        point: [_find(c["scores"]["compound"], point)[0] for c in cells] for point in _points(cells)
    }
    row["sites"] = {
        point: [
            statistics.mean(values)
            for values in zip(
                *([r["ce_increase"] for r in _find(c["scores"]["rows"], point)] for c in cells),
                strict=True,
            )
        ]
        for point in _points(cells)
    }
    return row


def _mean_increase(found: list[dict[str, Any]] | None) -> str:
    return "–" if found is None else f"{statistics.mean(row['ce_increase'] for row in found):.3f}"


def _points(cells: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_name(row) for row in cells[0]["scores"]["compound"]))


def _name(row: dict[str, Any]) -> str:
    return f"{row['source']} {row['family']} {row['sparsity']:g}"


def _find(rows: list[dict[str, Any]], point: str) -> list[dict[str, Any]]:
    return [row for row in rows if _name(row) == point]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of `table` as two Markdown tables: a line a variant, means over seeds.

    The second has what each site alone costs with fresh SAEs.
    """
    points = list(dict.fromkeys(point for row in rows for point in row["compound"]))
    head = ["variant", "seeds", "CE", "CE cost", "time", "‖x‖ a site", "effective rank a site"]
    lines = [[*head, *(f"compound, {point}" for point in points)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        measured = [row["compound"].get(point) for point in points]
        lines.append(
            [
                row["variant"],
                str(len(row["seeds"])),
                f"{statistics.mean(row['eval_ce']):.3f}",
                f"{statistics.mean(row['ce_cost']):+.3f}",
                f"{row['relative_time']:.2f}",
                ", ".join(f"{norm:.2g}" for norm in row["norms"]),
                ", ".join(f"{rank:.0f}" for rank in row["effective_ranks"]),
                *map(_mean_increase, measured),
            ]
        )
    fresh = [point for point in points if point.startswith("fresh ")]
    by_site = [["CE increase a site", *fresh], ["---"] * (1 + len(fresh))]
    for row in rows:
        by_site.append([row["variant"], *(_increases(row["sites"].get(p)) for p in fresh)])
    return f"{_text(lines)}\n{_text(by_site)}"


def _increases(found: list[float] | None) -> str:
    return "–" if found is None else ", ".join(f"{increase:.3f}" for increase in found)


def _text(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
