"""The README's figures are those of the kept results."""

import json

import pytest
from launching import REPOSITORY

from benchmarks.table import markdown

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "recipes" / "results"


def row(label, text=README):
    """Cells of the one line of a table that begins with a label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small():
    return read(RESULTS / "small" / "results.json")


def fresh_topk(rows, model):
    wanted = {"model": model, "family": "topk", "source": "fresh"}
    return [row for row in rows if wanted.items() <= row.items()]


@pytest.mark.parametrize(("label", "name"), [
    ("validation CE, nats a character", "eval_ce"), ("training CE", "train_ce")
])  # fmt: skip
def test_cross_entropies_of_the_small_pair(small, label, name):
    assert row(label) == [f"{model[name]:.3f}" for model in small["models"].values()]


def test_compound_increases_of_the_small_pair(small):
    found = row("compound CE increase, fresh TopK SAEs, Σ L0 15 / 25 / 50")
    for cell, model in zip(found, small["models"], strict=True):
        points = fresh_topk(small["compound"], model)
        assert [round(point["sum_l0"]) for point in points] == [15, 25, 50]
        assert cell == " / ".join(f"{point['ce_increase']:.3f}" for point in points)


def test_increases_a_site_of_the_small_pair(small):
    found = row("CE increase a site, fresh TopK SAEs, k 10")
    for cell, model in zip(found, small["models"], strict=True):
        sites = [r for r in fresh_topk(small["rows"], model) if r["sparsity"] == 10]
        assert [r["site"] for r in sites] == small["sites"]
        assert cell == ", ".join(f"{r['ce_increase']:.3f}" for r in sites)


def test_what_a_step_costs():
    kept = (REPOSITORY / "benchmarks" / "results").glob("*.json")
    measured = [results for results in map(read, kept) if "stages" in results]
    assert measured
    for line in markdown(measured).splitlines():
        assert not line.startswith("|") or line in README.splitlines(), line


@pytest.mark.parametrize(("label", "variant"), [
    ("plain", "plain"),
    ("plain, same time", "plain, same time"),
    *((f"`published`, λ {λ}", f"published, reconstruction_weight {λ}") for λ in (0.3, 1, 3, 10)),
    *((f"λ 1, `splice_weight` {α}", f"spliced, splice_weight {α}") for α in (0.1, 0.3, 1)),
])  # fmt: skip
def test_what_a_weight_buys(label, variant):
    table = (RESULTS / "study_weights" / "table.md").read_text(encoding="utf-8").splitlines()
    heading = [cell.strip() for cell in table[0].split("|")]
    kept = next(line for line in table if line.startswith(f"| {variant} |"))
    kept = dict(zip(heading, (cell.strip() for cell in kept.split("|")), strict=True))
    fresh = [
        " / ".join(kept[f"compound, fresh {family} {sparsity}"] for sparsity in (5, 10, 40))
        for family in ("topk", "standard")
    ]
    section = README.partition("## Which weight\n")[2].partition("\n## ")[0]
    assert row(label, section) == [kept["CE"], *fresh, kept["compound, cotrained topk 10"]]
