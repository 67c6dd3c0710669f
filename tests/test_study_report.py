"""What a study says: intervals and comparisons by hand, the verdict's rule, the page."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from keyboard import assert_usable_by_keys
from pages import (
    assert_headings_nest,
    assert_images_described,
    assert_in_tensorboard,
    assert_self_contained,
    assert_shown,
    needs_browser,
)
from pages import elements_of as parsed
from scipy import stats

from hf_saereg import cli
from hf_saereg.heads import FAMILIES
from hf_saereg.report import ReportError
from hf_saereg.report.findings import DOUBTED_SITE
from hf_saereg.report.l0_curves import l0_caption
from hf_saereg.report.study_curves import MeasuredStudy, at_equal_l0, stated_l0
from hf_saereg.report.study_findings import find_in_study
from hf_saereg.report.study_page import StudyFacts, write_study_page
from hf_saereg.report.study_statistics import Interval, against_baseline, site_changes
from hf_saereg.report.study_tables import NOT_REACHED, NOT_RUN, matrix, tallies
from hf_saereg.report.study_verdict import recommend
from hf_saereg.report.study_words import by_family, drawn_models
from hf_saereg.report.verdict import Curve, CurvePoint, Outcome
from hf_saereg.study import Study
from hf_saereg.study_cells import cell_folder, check_finished, finished_cells
from hf_saereg.study_l0 import L0Curve, SteeredTraining
from hf_saereg.study_report import write_study
from hf_saereg.study_settings import settings_of
from hf_saereg.study_table import table

SITES = ["blocks.0.hook_resid_pre", DOUBTED_SITE]
AT = {20.0: 2.0, 80.0: 0.5}  # Σ L0 → how the CE increase differs from a cell's own
RESULTS = REPOSITORY / "recipes" / "results" / "study_normalization"
STUDIES = [path.parent.name for path in RESULTS.parent.glob("study_*/study.json")]


def cell(variant, seed, eval_ce, increase, families=("topk",), at=AT, half=1.0, trained=40.0):
    """A cell whose fresh SAEs cost `increase` halfway between the two points on a log scale."""

    def row(family, k, factor, share=1.0):
        ours = increase * share * factor
        own = {"source": "fresh", "family": family, "sparsity": k, "d_sae": 64, "seed": seed}
        own |= {"model": variant, "kl": ours, "ce_recovered": None}
        return own | {"ce_increase": ours, "ce_increase_at_half": ours * half}

    compound = [row(f, k, factor) | {"sum_l0": k} for f in families for k, factor in at.items()]
    if trained and variant not in ("plain", "untrained", "as long"):
        own = {"source": "cotrained", "family": "topk", "sparsity": 20, "d_sae": 64, "seed": None}
        own |= {"model": variant, "kl": 0.3, "ce_recovered": None}
        compound.append(own | {"sum_l0": trained, "ce_increase": 0.3, "ce_increase_at_half": None})
    firing = {"fvu": 0.1, "dead_fraction": 0.0}
    firing["density_histogram"] = {"log10_edges": [-2, -1, 0], "counts": [60, 4], "never": 0}
    rows = [
        row(f, k, factor, 0.25) | {"site": site, "l0": k / 2} | firing
        for f in families
        for k, factor in at.items()
        for site in SITES
    ]
    norms = {"residual_norm": dict.fromkeys(SITES, 1.0)}
    norms["spectrum"] = {site: [0.5, 0.5] for site in SITES}
    return {
        "variant": variant,
        "seed": seed,
        "figures": {"eval_ce": eval_ce, "train_seconds": 10.0, "tokens_per_second": 100.0},
        "scores": {"compound": compound, "rows": rows, "baselines": norms},
        "transplanted": None,
    }


def setting(family="topk", control=None, curve=None, weight=None):
    model = {"untrained": "untrained", "same time": "plain"}.get(control, "regularized")
    return {
        **{"model": "plain" if family == "none" and not control else model, "family": family},
        **{"control": control, "flops_per_token": 6e6, "curve": curve or "own"},
        **{"knob": weight and "reconstruction_weight", "weight": weight, "also": {}},
    }


SETTINGS = {
    "plain": setting("none", curve="plain"),
    "light": setting(curve="topk", weight=1.0),
    "heavy": setting(curve="topk", weight=3.0),
    "as long": setting("none", "same time", "as long"),
    "untrained": setting("none", "untrained", "untrained"),
}
SEEDS = (0, 1, 2)


def study_of(light=0.5, heavy=0.25, as_long=1.0, seeds=SEEDS):
    """Three seeds: factors on the plain model's CE increase, which differ a little by seed."""
    cells = []
    for seed in seeds:
        base, noise = 0.4 + 0.1 * seed, 1 + 0.02 * seed
        cells += [
            cell("plain", seed, 2.0 + seed, base),
            cell("light", seed, 2.01 + seed + 0.001 * seed, base * light * noise),
            cell("heavy", seed, 2.2 + seed, base * heavy * noise),
            cell("as long", seed, 1.9 + seed, base * as_long / noise),
            cell("untrained", seed, 4.8 + seed, base * 0.01),
        ]
    return cells


def recommended(settings=SETTINGS, **factors):
    return recommend(MeasuredStudy.of(study_of(**factors), "plain"), settings)


def curve(**at):
    return Curve.through(CurvePoint(float(l0[1:]), ce, 0.0) for l0, ce in at.items())


# ---- statistics ----


def test_an_interval_is_students_t_over_the_seeds():
    found = Interval.of({0: 1.0, 1: 2.0, 2: 3.0})
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138))  # 4.302653 / √3
    values = {0: -0.3, 3: -0.1, 4: -0.45, 7: 0.02}
    expected = stats.ttest_1samp(list(values.values()), 0).confidence_interval(0.95)
    assert (Interval.of(values).low, Interval.of(values).high) == pytest.approx(tuple(expected))
    assert Interval.of(values).seeds == (0, 3, 4, 7)


def test_one_seed_has_no_interval_and_nothing_told_from_chance():
    found = Interval.of({5: 0.7})
    assert (found.mean, found.low, found.high) == (0.7, None, None)
    assert not found.is_above_zero
    with pytest.raises(ValueError, match="at least one"):
        Interval.of({})


def test_curves_are_compared_at_the_nearest_l0_that_both_reached():
    ours, plain = curve(_20=0.4, _80=0.2), curve(_40=0.6, _160=0.3)
    found = at_equal_l0({0: ours}, {0: plain}, wanted=10)
    assert found.l0 == 40 and found.log_ratios == {0: pytest.approx(math.log(0.3 / 0.6))}
    found = at_equal_l0({0: ours}, {0: plain}, wanted=80)
    assert found.log_ratios == {0: pytest.approx(math.log(0.2 / 0.45))}


@pytest.mark.parametrize(
    "ours, reason",
    [
        ({1: curve(_20=0.4)}, "not run"),
        ({0: curve(_20=0.4, _30=0.2)}, "no L0 that both reached"),
        ({0: curve(_40=-0.1, _160=0.1)}, "not positive"),
    ],
)
def test_what_cannot_be_compared_says_why(ours, reason):
    found = at_equal_l0(ours, {0: curve(_40=0.6, _160=0.3)}, wanted=40)
    assert not found.log_ratios and reason in found.reason


def test_the_stated_l0_is_the_one_nearest_to_the_wanted_that_most_reached():
    curves = {"plain": {0: curve(_20=1, _80=0)}, "a": {0: curve(_40=1, _160=0)}}
    assert stated_l0(curves, "plain", 50) == 50
    assert stated_l0(curves, "plain", 25) == 40
    assert stated_l0(curves, "plain", 500) == 80
    assert stated_l0(curves | {"b": {0: curve(_300=1)}}, "plain", 50) == 50
    assert stated_l0(curves, "absent", 50) is None


def test_variants_are_paired_with_the_baseline_by_seed():
    study = MeasuredStudy.of([*study_of(), cell("light", 9, 0.0, 0.1)], "plain")
    row = next(row for row in against_baseline(study) if row.variant == "light")
    assert row.eval_ce.seeds == SEEDS and row.eval_ce.mean == pytest.approx(0.011)
    assert row.eval_ce.low == pytest.approx(0.011 - 4.302653 * 0.001 / math.sqrt(3))
    change = row.compound["topk"]
    logs = [math.log(0.5 * (1 + 0.02 * seed)) for seed in SEEDS]
    assert change.sum_l0 == 40 and change.log_ratio.mean == pytest.approx(sum(logs) / 3)


def test_sites_are_won_seed_by_seed():
    found = site_changes(MeasuredStudy.of(study_of(), "plain"))
    assert {change.site for change in found} == set(SITES)
    assert tallies(found)["light", "topk"] == {Outcome.WIN: 6}
    worse = site_changes(MeasuredStudy.of(study_of(light=2, heavy=1), "plain"))
    assert tallies(worse)["light", "topk"] == {Outcome.LOSS: 6}
    assert tallies(worse)["heavy", "topk"][Outcome.TIE] >= 2


def test_the_matrix_names_what_is_missing():
    cells = [
        cell("plain", 0, 2.0, 0.4, ("topk", "gated")),
        cell("light", 0, 2.0, 0.2),
        cell("heavy", 0, 2.0, 0.1, at={200.0: 1.0, 400.0: 0.5}),
    ]
    found = {
        (own.regularizer, own.variant, own.fresh): own
        for own in matrix(MeasuredStudy.of(cells, "plain"), SETTINGS, list(FAMILIES))
    }
    ours = found["topk", "light", "topk"]
    assert ours.ce_increase == pytest.approx(0.2 * 1.25) and ours.ratio == pytest.approx(0.5)
    assert found["topk", "heavy", "topk"].missing == NOT_REACHED
    assert found["topk", "light", "gated"].missing == NOT_RUN
    assert found["jumprelu", None, "jumprelu"].missing == NOT_RUN
    assert found["none", "untrained", "topk"].missing == NOT_RUN
    assert {own.fresh for own in found.values()} == set(FAMILIES)


@pytest.mark.parametrize("half, settled", [(1.03, True), (1.2, False)])
def test_fresh_saes_that_still_move_are_not_settled(half, settled):
    (found,) = MeasuredStudy.of([cell("plain", 0, 2.0, 0.4, half=half)], "plain").convergence
    assert (found.model, found.family) == ("plain", "topk")
    assert found.mean == found.median == pytest.approx(half - 1)
    assert found.is_settled is settled


def test_movements_that_seeds_make_up_for_count_as_settled():
    cells = [cell("plain", seed, 2.0, 0.4, half=half) for seed, half in enumerate((1.2, 0.8))]
    (found,) = MeasuredStudy.of(cells, "plain").convergence
    assert found.mean == pytest.approx(0, abs=1e-12) and found.median == pytest.approx(0.2)


def test_a_cell_that_lacks_a_key_is_named():
    damaged = cell("plain", 3, 2.0, 0.4)
    del damaged["scores"]["rows"][1]["l0"]
    with pytest.raises(ReportError, match=r"'plain' at seed 3 .*'scores.rows\[1\].l0'"):
        MeasuredStudy.of([damaged], "plain")


# ---- the rule ----


def test_the_largest_gain_per_cost_is_recommended():
    found = recommended()
    assert (found.variant, found.weight) == ("light", 1.0)  # ln 2 / 0.011 against ln 4 / 0.2
    light = next(gain for gain in found.gains if gain.variant == "light")
    assert light.gain_per_cost == pytest.approx(light.gain.mean / 0.011)
    assert "beyond it" in found.controls["as long"]
    assert "no gain at the price" in found.controls["untrained"]


def test_a_gain_that_the_control_of_the_same_time_has_too_is_none():
    found = recommended(as_long=0.45, heavy=0.1)
    assert found.variant == "heavy"
    light = next(gain for gain in found.gains if gain.variant == "light")
    assert "no gain" in light.refusal and "as long" in light.refusal
    assert "“light” is no gain" in found.controls["as long"]


def test_a_gain_that_few_seeds_cannot_tell_from_the_controls_is_not_recommended():
    settings = {name: own for name, own in SETTINGS.items() if name != "untrained"}
    cells = [
        *(cell("plain", seed, 2.0, 0.4) for seed in SEEDS),
        *(cell("light", seed, 2.0, 0.2) for seed in SEEDS),
        *(cell("as long", seed, 2.0, 0.4 * f) for seed, f in zip(SEEDS, (2, 0.3, 1), strict=True)),
    ]
    found = recommend(MeasuredStudy.of(cells, "plain"), settings)
    assert found.variant is None and "cannot be told from the control" in found.sentence
    assert "“light” cannot be told from it" in found.controls["as long"]


def test_a_control_that_trained_shorter_clears_nobody():
    cells = study_of()
    for own in cells:
        if own["variant"] == "heavy":
            own["figures"]["train_seconds"] = 20.0
    found = recommend(MeasuredStudy.of(cells, "plain"), SETTINGS)
    refusals = {gain.variant: gain.refusal for gain in found.gains}
    assert refusals["heavy"] == "a gain for which no control trained as long"
    assert refusals["light"] is None
    assert "“heavy” is beyond it, but took longer to train" in found.controls["as long"]
    longer = SETTINGS | {"longer": setting("none", "same time", "longer")}
    for seed in SEEDS:
        own = cell("longer", seed, 1.9 + seed, 0.4 + 0.1 * seed, trained=None)
        own["figures"]["train_seconds"] = 19.0
        cells.append(own)
    found = recommend(MeasuredStudy.of(cells, "plain"), longer)
    assert {gain.variant: gain.refusal for gain in found.gains}["heavy"] is None


def test_a_gain_is_read_next_to_an_end_of_what_was_measured():
    cells = [
        cell(variant, seed, 2.0, increase, at={low: 2.0, 80.0: 0.5}, trained=None)
        for variant, increase, low in [("plain", 0.4, 20.0), ("light", 0.2, 20.2)]
        for seed in SEEDS
    ] + [cell("heavy", seed, 2.0, 0.3, at={10.0: 2.0, 19.8: 0.5}, trained=None) for seed in SEEDS]
    settings = {name: SETTINGS[name] for name in ("plain", "light", "heavy")}
    study = MeasuredStudy.of(cells, "plain")
    assert study.sum_l0["topk"] in (19.8, 20.0, 20.2)  # all three reach it, to 2 %
    gains = {gain.variant: gain.gain for gain in recommend(study, settings).gains}
    assert gains["light"].mean > 0 and gains["heavy"] is not None


@pytest.mark.parametrize(
    "factors, said",
    [
        ({"light": 2, "heavy": 3}, "no gain ("),
        ({"seeds": (0,)}, "one seed"),
        ({"light": 0.99, "heavy": 0.98}, "does not exclude zero"),
    ],
)
def test_where_nothing_can_be_recommended_it_is_said_why(factors, said):
    found = recommended(**factors)
    assert found.variant is None and found.sentence.startswith("No weight can be recommended")
    assert said in found.sentence


def test_an_unfinished_control_holds_the_recommendation_back():
    found = recommended(SETTINGS | {"other": setting("none", "same time")})
    assert found.variant is None and "“other” is not finished" in found.sentence
    assert "is not finished" in found.controls["other"]


# ---- the page, and the study in the repository ----


STEPS = [10, 20, 30, 1400]
STEERED = [
    SteeredTraining(
        "light",
        0,
        dict.fromkeys(SITES, 10.0),
        {
            SITES[0]: L0Curve(STEPS, [250.0, 10.5, 9.5, 10.0]),
            SITES[1]: L0Curve(STEPS, [250.0, 0.0, 9.0, 10.9]),
        },
    ),
    SteeredTraining(
        "heavy",
        0,
        {SITES[0]: 20.0, SITES[1]: 40.0},
        {
            SITES[0]: L0Curve(STEPS, [250.0, 90.0, 30.0, 21.0]),
            SITES[1]: L0Curve(STEPS, [250.0, 90.0, 36.0, 31.25]),
        },
    ),
]


CURVES = ("compound_topk_64", "sites_topk_64", "densities_topk_64", "bars", "ce", "norms")
FIGURES = ("trade_off", "l0", *CURVES)


def page_of(cells, folder, settings=SETTINGS, steered=()):
    rows = table(cells, "plain")
    found = find_in_study(cells, rows, "plain", settings, list(FAMILIES))
    for name in ("study.json", "table.md"):
        (folder / name).touch()
    facts = StudyFacts(Path("a_study.yaml"), SEEDS, [("heavy", 7)], ["saereg", "compare", "a b"])
    return write_study_page(found, settings, facts, steered, folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    cells = study_of()
    for own in cells:
        if own["variant"] == "light":
            compound = {"sum_l0": 33.0, "ce_increase": 0.75}
            own["transplanted"] = {"rows": [], "compound": compound}
    return page_of(cells, tmp_path_factory.mktemp("page"), steered=STEERED)


def test_the_page_has_the_verdict_first(page):
    html = page.read_text("utf-8")
    main = html.partition('<main id="main"')[2]
    assert main.index("Recommended: reconstruction_weight 1") < main.index("<nav")
    assert "Not drawn: “untrained”, at a CE of 5.800" in html
    for said in ("“heavy” at seed 7", "0.750", "not run", "6 wins", "saereg compare &#39;a b&#39;"):
        assert said in html
    assert "One seed" not in html and "Not settled" not in html
    text = " ".join(re.sub("<[^>]+>", " ", html).split())
    assert "increase of “light” over the baseline’s: × 0.51 with fresh topk [0." in text
    assert "does not exclude 1" not in text
    assert "untrained topk 6 wins: it has next to nothing to lose" in text
    assert "not in this folder any more: “heavy”." in text


def test_the_page_is_whole(page):
    elements = parsed(page)
    assert_self_contained(page, elements)
    assert_images_described(elements, number=len(FIGURES))
    assert_headings_nest(elements)


def test_figures_are_images_in_tensorboard(page):
    assert_in_tensorboard(page, FIGURES)


@needs_browser
def test_browser_shows_the_page_without_an_error(page, tmp_path):
    assert_shown(page, tmp_path, images=len(FIGURES))


@needs_browser
def test_the_page_can_be_used_by_keys_alone(page, tmp_path):
    assert_usable_by_keys(page, tmp_path)


def test_the_words_of_l0_say_which_site_settles_when(page):
    words = l0_caption(STEERED)
    assert "“light”: every site has settled, between steps 20 and 30" in words.reading
    assert "“heavy”: 1 of 2 sites has settled, at step 1,400" in words.reading
    assert "Seed 0, as logged" in words.reading
    assert (
        "“light”, target 10: before block 0 within 10\N{NO-BREAK SPACE}% from step 20, before "
        "block 3 within 10\N{NO-BREAK SPACE}% from step 30" in words.description
    )
    assert "“heavy”, target 20, 40: " in words.description
    assert "before block 3 not settled, at 31.2 in the end" in words.description
    assert words.reading in page.read_text("utf-8")


def test_a_study_without_a_log_of_l0_has_no_figure_of_it(tmp_path):
    page = page_of(study_of(), tmp_path)
    assert 'id="steering"' not in page.read_text("utf-8")
    assert not (tmp_path / "figures" / "l0.png").exists()
    assert_self_contained(page, parsed(page))


def test_a_study_of_one_seed_with_hostile_names_is_shown(tmp_path):
    cells = [cell("plain", 0, 2.0, 0.4), cell("<script>", 0, 2.0, 0.2, half=1.5)]
    settings = {"plain": SETTINGS["plain"], "<script>": setting()}
    html = page_of(cells, tmp_path, settings).read_text("utf-8")
    assert "<script>" not in html and "One seed" in html and "Not settled" in html
    assert "no control" in html


def test_of_many_variants_those_that_matter_are_drawn(tmp_path):
    names = {f"other {i}": 0.9 - 0.1 * i for i in range(4)}
    cells = study_of() + [
        cell(name, seed, 2.3 + seed, (0.4 + 0.1 * seed) * factor)
        for name, factor in names.items()
        for seed in SEEDS
    ]
    settings = SETTINGS | {name: setting(curve=name) for name in names}
    found = find_in_study(cells, table(cells, "plain"), "plain", settings, list(FAMILIES))
    drawn = [model.label for model in drawn_models(found)]
    assert drawn == ["plain", "light", "heavy", "as long", "untrained", "other 3"]
    assert "6 of 9 variants" in page_of(cells, tmp_path, settings).read_text("utf-8")


def test_a_study_is_reported_again_from_its_folder_alone(tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(RESULTS, folder)
    study = Study.read(REPOSITORY / "recipes" / "study_normalization.yaml")
    first = write_study(study, settings_of(study), folder, folder).read_text("utf-8")
    cli.main(["report", str(folder), "--output_dir", str(tmp_path / "again")])
    again = tmp_path / "again"
    assert (again / "index.html").read_text("utf-8") == first
    for name in ("study.json", "table.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(SystemExit, match="is a study, which has a page of its own"):
        cli.main(["report", str(folder), str(folder), "--output_dir", str(tmp_path / "both")])
    (folder / "study.json").write_text('{"settings": {}}')
    with pytest.raises(SystemExit, match="has no 'study', from which a study is read again"):
        cli.main(["report", str(folder)])


def test_the_only_variant_is_told_by_family_though_it_is_not_recommended():
    cells = [own for own in study_of() if own["variant"] in ("plain", "light")]
    settings = {name: SETTINGS[name] for name in ("plain", "light", "untrained")}
    found = find_in_study(cells, table(cells, "plain"), "plain", settings, list(FAMILIES))
    assert found.recommendation.variant is None
    assert by_family(found).startswith("Compound CE increase of “light” over the baseline’s: × 0.5")
    every = [own for own in study_of() if own["variant"] in ("plain", "light", "heavy")]
    settings["heavy"] = SETTINGS["heavy"]
    found = find_in_study(every, table(every, "plain"), "plain", settings, list(FAMILIES))
    assert found.recommendation.variant is None and by_family(found) == ""


def test_a_study_whose_baseline_alone_is_finished_has_a_page(tmp_path):
    html = page_of([cell("plain", 0, 2.0, 0.4)], tmp_path).read_text("utf-8")
    assert "nothing can be drawn" in html and "no regularized variant is finished" in html


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_in_the_repository_says_what_its_cells_do(name):
    study = Study.read(REPOSITORY / "recipes" / f"{name}.yaml")
    folder = REPOSITORY / "recipes" / "results" / name
    cells = finished_cells(study, folder)
    rows, settings = table(cells, study.baseline), settings_of(study)
    found = find_in_study(cells, rows, study.baseline, settings, list(FAMILIES))
    kept = json.loads((folder / "study.json").read_text())
    ours = json.loads(json.dumps(found.figures()))
    assert set(kept) == {"study", "rows", "settings", "transplanted", *ours}
    for row, expected in zip(ours["against_baseline"], kept["against_baseline"], strict=True):
        assert row["variant"] == expected["variant"]
        assert row["eval_ce"].pop("seeds") == expected["eval_ce"].pop("seeds")
        assert row["eval_ce"] == pytest.approx(expected["eval_ce"])
    for cell_, expected in zip(ours["matrix"], kept["matrix"], strict=True):
        assert cell_ == pytest.approx(expected)
    assert ours["recommendation"]["sentence"] == kept["recommendation"]["sentence"]
    assert ours["sum_l0"] == pytest.approx(kept["sum_l0"])
    assert [row["variant"] for row in rows] == [row["variant"] for row in kept["rows"]]
    for cell_ in cells:  # raises where one was made with other options
        own = cell_folder(folder, cell_["variant"], cell_["seed"])
        found = check_finished(study, cell_["variant"], cell_["seed"], folder)
        assert found == (own / "run.json").is_file()
    assert (folder / "index.html").is_file()
