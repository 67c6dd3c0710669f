"""The README's figures are those of the kept results."""

import json
import math
import statistics

import pytest
from launching import REPOSITORY

from benchmarks.table import markdown
from hf_saereg.report.tuned import markdown as tuned_markdown
from hf_saereg.report.tuned import read_tuned

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "recipes" / "results"


def row(label, text=README):
    """Cells of the one line of a table that begins with a label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_the_term_bought_at_three_seeds():
    study = read(RESULTS / "study_small" / "study.json")
    (own,) = [one for one in study["against_baseline"] if one["variant"] == "published"]
    kept, sites = tables_of("study_small")
    text, pair = section("What it bought"), ("plain", "published")

    def difference(interval):
        return f"+{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"

    def ratio(family):
        found = own["compound"][family]["log_ratio"]
        mean, low, high = (math.exp(found[name]) for name in ("mean", "low", "high"))
        return f"× {mean:.2f} [{low:.2f}, {high:.2f}]"

    assert own["eval_ce"]["seeds"] == [0, 1, 2]
    assert round(own["compound"]["topk"]["sum_l0"]) == 50
    assert row("validation CE, nats a character", text) == [
        *(kept[name]["CE"] for name in pair),
        difference(own["eval_ce"]),
    ]
    for label, family in (
        ("fresh TopK SAEs, k 5 / 10 / 20", "topk"),
        ("fresh standard SAEs, steered to L0 5 / 10 / 20", "standard"),
    ):
        costs = [compound(kept[name], family, (5, 10, 20)) for name in pair]
        assert row(f"compound CE increase, {label}", text) == [*costs, ratio(family)]
    found = row("CE increase a site, fresh TopK SAEs, k 10", text)
    assert found[:2] == [sites[name]["fresh topk 10"] for name in pair]
    heads = row("compound CE increase, the model's own heads", text)
    assert heads[1] == kept["published"]["compound, cotrained topk 10"]


def test_what_adapters_around_a_frozen_head_learn():
    history = read(RESULTS / "gpt2_base_spliced" / "trainer_state.json")["log_history"]
    first, last = [entry for entry in history if "eval_spliced_loss" in entry]
    site = "blocks.2.hook_resid_pre"
    said = (
        f"CE {last['eval_base_loss']:.3f}",
        f"{first['eval_spliced_loss']:.3f} to {last['eval_spliced_loss']:.3f}",
        f"CE from {first[f'eval_ce/{site}']:.3f} to {last[f'eval_ce/{site}']:.3f}",
        f"FVU {first[f'eval_fvu/{site}']:.3f}, then {last[f'eval_fvu/{site}']:.3f}",
        f"{last['eval_loss']:.3f}, {last['eval_loss'] - last['eval_base_loss']:.3f} above",
    )
    text = " ".join(README.split())
    for figure in said:
        assert figure in text, figure


def test_what_a_step_costs():
    kept = (REPOSITORY / "benchmarks" / "results").glob("*.json")
    measured = [results for results in map(read, kept) if "stages" in results]
    assert measured
    for line in markdown(measured).splitlines():
        assert not line.startswith("|") or line in README.splitlines(), line


def section(title):
    """A section of the README."""
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def tables_of(study):
    """Both tables of a study: by variant, the cells by their heading."""
    text = (RESULTS / study / "table.md").read_text(encoding="utf-8")
    found = []
    for table in text.split("\n\n"):
        heading, _, *lines = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        found.append({own[0]: dict(zip(heading, own, strict=True)) for own in lines})
    return found


def compound(cells, family, sparsities):
    return " / ".join(cells[f"compound, fresh {family} {k}"] for k in sparsities)


@pytest.mark.parametrize(("label", "variant"), [
    ("plain", "plain"),
    ("plain, same time", "plain, same time"),
    *((f"`published`, λ {λ}", f"published, reconstruction_weight {λ}") for λ in (0.3, 1, 3, 10)),
    *((f"λ 1, `splice_weight` {α}", f"spliced, splice_weight {α}") for α in (0.1, 0.3, 1)),
])  # fmt: skip
def test_what_a_weight_buys(label, variant):
    kept, _ = (table.get(variant) for table in tables_of("study_weights"))
    fresh = [compound(kept, family, (5, 10, 40)) for family in ("topk", "standard")]
    found = row(label, section("Which weight"))
    assert found == [kept["CE"], *fresh, kept["compound, cotrained topk 10"]]


@pytest.mark.parametrize(("label", "variant"), [
    ("none", "plain"),
    ("`published`, λ 3", "published"),
    ("`published`, λ 1", "published 1"),
    ("`detached`, λ 3", "detached"),
    ("`layer_norm`, λ 0.03", "layer_norm 0.03"),
    ("`variance`, λ 0.1", "variance 0.1"),
    ("`published`, λ 1, `splice_weight` 0.3", "published 1 + splice 0.3"),
])  # fmt: skip
def test_what_a_form_of_the_term_buys(label, variant):
    kept, sites = (table[variant] for table in tables_of("study_normalization"))
    (exact,) = [
        own
        for own in read(RESULTS / "study_normalization" / "study.json")["rows"]
        if own["variant"] == variant
    ]
    time = f"{exact['relative_time']:.1f}".removesuffix(".0")
    assert row(label, section("Which form of the term")) == [
        kept["CE"],
        *(compound(kept, family, (5, 10, 40)) for family in ("topk", "standard")),
        sites["fresh topk 10"],
        ", ".join(f"{norm:.1f}" for norm in exact["norms"]),
        kept["effective rank a site"],
        time,
    ]


@pytest.mark.parametrize(("label", "variant"), [
    ("none", "plain"),
    ("`topk`", "topk 10"),
    ("`batchtopk`", "batchtopk 10"),
    *((f"`{f}`, L0 {k}", f"{f} {k}") for f in ("standard", "gated", "jumprelu") for k in (10, 30)),
    ("`topk`, `token_fraction` 0.5", "topk 10, half the tokens"),
    ("`topk`, `token_fraction` 0.25", "topk 10, a quarter of the tokens"),
    ("`topk`, `token_fraction` 0.125", "topk 10, an eighth of the tokens"),
])  # fmt: skip
def test_what_a_family_buys(label, variant):
    kept, _ = (table[variant] for table in tables_of("study_families"))
    expected = [compound(kept, "topk", (5, 10, 40)), compound(kept, "standard", (10,))]
    found = row(label, section("Which family, and how cheaply"))
    assert found == [kept["CE"], *expected]


def test_what_fine_tunings_led_to():
    runs = [path.parent for path in sorted((RESULTS / "gpt2_base").glob("*/run.json"))]
    tuned = read_tuned([run for run in runs if "mode" in read(run / "run.json")["options"]])
    kept = {line.split("|")[1]: line for line in tuned_markdown(tuned).splitlines()}
    ours = [line for line in README.splitlines() if line.startswith("| `gpt2_base_")]
    quoted = [line for line in ours if line.split("|")[1] in kept]
    assert len(quoted) == len(kept) - 2  # without the heading and the line below it
    assert [kept[line.split("|")[1]] for line in quoted] == quoted


def mean(rows, read_one):
    values = [read_one(row) for row in rows if row["d_sae"] == 128 and row["source"] == "fresh"]
    return statistics.fmean(values)


def test_whether_features_are_better_or_packed():
    text = section("What it bought")
    found = [read(RESULTS / "quality" / name / "quality.json") for name in ("plain", "published")]
    matched = [
        f"{mean(own['consistency'], lambda r: r['matched']):.3f} "
        f"({mean(own['consistency'], lambda r: r['chance_matched']):.3f})"
        for own in found
    ]
    assert row("cosine with the other seed's directions, matched one to one", text) == matched
    for label, i in (
        ("share of a direction that its best one of the SAE of 256 makes up", 0),
        ("… its best four together", 3),
    ):
        shares = [
            f"{mean(own['composition'], lambda r: r['explained'][i]):.3f} "  # noqa: B023
            f"({mean(own['composition'], lambda r: r['chance'][i]):.3f})"  # noqa: B023
            for own in found
        ]
        assert row(label, text) == shares
