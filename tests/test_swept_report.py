"""The page of what sweeps found: curves and comparisons by hand, one model and several."""

import json
import re
from html import unescape

import pytest
from keyboard import assert_usable_by_keys
from pages import (
    assert_headings_nest,
    assert_images_described,
    assert_self_contained,
    assert_shown,
    elements_of,
    needs_browser,
)
from test_report import make_results
from tiny_recipe import TINY, configuration

from hf_saereg import cli
from hf_saereg.character import CharacterJob
from hf_saereg.commands.sweep import SweepArguments
from hf_saereg.report.measured import read_measured
from hf_saereg.report.results import ReportError
from hf_saereg.report.swept import read_runs, unlike
from hf_saereg.report.swept_curves import (
    Variant,
    compare,
    fresh,
    mean_curve,
    variant_convergence,
    variants,
)
from hf_saereg.report.swept_page import headline, write_swept_report

SITES = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
TOPK = Variant("topk", 64)
HISTOGRAM = {"log10_edges": [-2.0, -1.0, 0.0], "counts": [40, 20], "never": 4}


def row(model, seed, sparsity, increase, **changes):
    return {
        "model": model,
        "family": "topk",
        "source": "fresh",
        "sparsity": sparsity,
        "d_sae": 64,
        "seed": seed,
        "ce_increase": increase,
        "ce_increase_at_half": increase * 1.02,
        "ce_recovered": 0.9,
        "kl": increase / 2,
    } | changes


def make_sweep(model="model", at={10: (0.4, 0.6), 40: (0.1, 0.3)}):  # noqa: B006
    """Two seeds a k, by k; L0 is k at each of the two sites."""
    found = {"rows": [], "compound": []}
    for k, increases in at.items():
        for seed, increase in enumerate(increases):
            found["compound"].append(row(model, seed, k, increase, sum_l0=2 * k))
            for site in SITES:
                own = {"site": site, "l0": float(k), "fvu": 0.1, "dead_fraction": 0.06}
                own["density_histogram"] = HISTOGRAM
                found["rows"].append(row(model, seed, k, increase / 4, **own))
    base = {
        "clean_ce": 2.0,
        "mean_ablated_ce": dict.fromkeys(SITES, 3.0),
        "mean_ablated_ce_all": 3.5,
        "zero_ablated_ce": dict.fromkeys(SITES, 3.25),
        "zero_ablated_ce_all": 4.0,
    }
    setup = {"dataset": "text", "model": "1 layer", "command": "saereg sweep", "device": "1 × cpu"}
    own = {"sites": SITES, "baselines": {model: base}, "seconds": {"fresh": 1.0}, "setup": setup}
    return found | own


def save(folder, results):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def text_of(page):
    html = page.read_text("utf-8").partition("<body>")[2]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = save(folder / "a", make_sweep())
    second = save(folder / "b", make_sweep(at={20: (0.1, 0.1), 80: (0.0, 0.2)}))
    return first, second


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return write_swept_report(runs, tmp_path_factory.mktemp("page"))


def test_models_of_the_same_name_are_told_apart_by_their_run(runs):
    assert [model.label for model in read_runs(runs)] == ["model (a)", "model (b)"]
    assert [model.label for model in read_runs(runs[:1])] == ["model"]


def test_runs_of_the_same_folder_name_are_told_apart_by_as_much_of_their_paths_as_it_takes(
    tmp_path,
):
    names = {"x/sweep": "merged", "y/sweep": "merged", "z/sweep": "other"}
    folders = [save(tmp_path / path, make_sweep(name)) for path, name in names.items()]
    labels = ["merged (x/sweep)", "merged (y/sweep)", "other"]
    assert [model.label for model in read_runs(folders)] == labels
    setup = {"dataset": "text", "tokens": {}, "command": "saereg quality"}
    measured = {"heads": [], "consistency": [], "composition": [], "setup": setup}
    for folder in folders:
        (folder / "quality.json").write_text(json.dumps(measured))
    assert [model.label for model in read_measured(folders)] == labels


def test_a_curve_goes_through_the_means_over_seeds(runs):
    (model,) = read_runs(runs[:1])
    assert variants([model]) == [TOPK]
    points = mean_curve(model.sets).points
    assert [point[:2] for point in points] == [(20, pytest.approx(0.5)), (80, pytest.approx(0.2))]
    assert variant_convergence(model, TOPK).median == pytest.approx(0.02)


def test_models_are_compared_where_all_of_them_were_measured(runs):
    found = compare(read_runs(runs), TOPK)  # Σ L0 20 to 80, and 40 to 160
    assert [point.l0 for point in found] == pytest.approx(
        [40, 40 * 2**0.25, 40 * 2**0.5, 67.27, 80], rel=1e-3
    )
    first, last = found[0], found[-1]
    assert first.ce_increase == pytest.approx([0.35, 0.1])  # halfway in log L0 from 0.5 to 0.2
    assert first.spread == pytest.approx([0.2, 0.0])
    assert last.ce_increase == pytest.approx([0.2, 0.1])
    assert last.spread == pytest.approx([0.2, 0.1])  # 0.1 to 0.0 and 0.1 to 0.2, half of the way


def test_models_without_a_shared_l0_are_not_compared(runs, tmp_path):
    far = save(tmp_path / "far", make_sweep("far", at={200: (0.1, 0.1)}))
    models = read_runs([runs[0], far])
    assert compare(models, TOPK) == []
    assert "no Σ\xa0L0 that all models reached" in headline(models, {TOPK: []})


def test_the_page_of_several_models_shows_them_side_by_side(page):
    text = text_of(page)
    assert "SAEs on model (a) and model (b)" in text
    assert "topk, d_sae 64: 0.275 on model (a) (CE 2.000) and 0.100 on model (b)" in text
    assert "(CE 2.000) at Σ L0 57" in text
    assert "0.350 (0.200) 0.100 (0.000)" in text
    assert "One seed" not in text and "Not settled" not in text


def test_what_was_not_made_alike_is_said(tmp_path):
    longer = make_sweep("longer")
    longer["setup"] |= {"steps": 2000, "tokens_per_step": 512, "dataset": "text"}
    longer["sites"] = [*SITES, "blocks.1.hook_resid_post"]
    shorter = make_sweep("shorter")
    shorter["setup"] |= {"steps": 200, "tokens_per_step": 512}
    silent = make_sweep("silent")
    runs = [save(tmp_path / str(i), run) for i, run in enumerate((longer, shorter, silent))]
    assert unlike(read_runs(runs)) == {"fresh_steps": [("longer", 2000), ("shorter", 200)]}
    text = text_of(write_swept_report(runs, tmp_path / "page"))
    assert "Not made alike" in text and "steps 2000 (longer), 200 (shorter)" in text
    assert "blocks.1.hook_resid_post" in text


def test_a_sweep_beside_a_comparison_is_compared_by_the_training_of_its_saes(tmp_path):
    """`steps` of a comparison are the language model's."""
    trained = {"regularizer": "topk heads", "steps": 2500, "tokens_per_step": 4096}
    alike = {"fresh_steps": 200, "fresh_tokens_per_step": 512}
    setups = {
        "sweep": alike,
        "older sweep": {"steps": 200, "tokens_per_step": 512},
        "comparison": trained | alike,
        "older comparison": trained,
        "longer comparison": trained | alike | {"fresh_steps": 400},
    }
    runs = {name: make_sweep(name) for name in setups}
    for name, own in setups.items():
        runs[name]["setup"] |= own
    runs["older sweep"]["models"] = {"older sweep": {"eval_ce": 2.0, "parameters": 8}}
    folders = [save(tmp_path / name, run) for name, run in runs.items()]
    assert unlike(read_runs(folders[:4])) == {}
    told = ("sweep", "older sweep", "comparison")
    expected = [*((name, 200) for name in told), ("longer comparison", 400)]
    assert unlike(read_runs(folders)) == {"fresh_steps": expected}


def test_a_recipe_tells_the_training_of_its_fresh_saes_as_a_sweep_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = configuration(tmp_path, fresh_batch_size=2, fidelity_blocks=3)
    setup = CharacterJob.from_options(["--config", str(config)]).setup
    arguments = SweepArguments(
        "model", max_steps=TINY["fresh_steps"], batch_size=2, families=["topk"]
    )
    block = TINY["block_size"]
    assert arguments.schedule.told(block).items() <= setup.items()
    assert (setup["fresh_tokens_per_step"], setup["tokens_per_step"]) == (2 * block, 4 * block)
    assert setup["scored_tokens"] == 3 * block and setup["text_seed"] == setup["seed"] == 3


def test_sizes_that_differ_by_site_are_a_variant_of_their_own(tmp_path):
    mixed, even = make_sweep("mixed"), make_sweep("even")
    for own in mixed["compound"]:
        own["d_sae"] = "64-128"
    for own in mixed["rows"]:
        own["d_sae"] = 64 if own["site"] == SITES[0] else 128
    models = read_runs([save(tmp_path / "a", mixed), save(tmp_path / "b", even)])
    both = variants(models)
    assert [variant.d_sae for variant in both] == ["64-128", 64]
    assert [len(fresh(model.sets, both[0])) for model in models] == [4, 0]
    assert len(fresh(models[0].heads, both[0])) == 8


def test_the_page_of_one_model_shows_that_model(runs, tmp_path):
    text = text_of(write_swept_report(runs[:1], tmp_path))
    assert "SAEs on model" in text and "model (a)" not in text
    assert "0.500 (0.200)" in text  # at its own lowest Σ L0
    assert "3.2500" not in text and "3.250" in text  # ablated by zeros


def test_one_seed_and_unsettled_saes_are_said_to_be(tmp_path):
    results = make_sweep(at={10: (0.4,), 40: (0.1,)})
    for rows in (results["rows"], results["compound"]):
        for own in rows:
            own["ce_increase_at_half"] = own["ce_increase"] * 1.3
            own["ce_recovered"] = None
    text = text_of(write_swept_report([save(tmp_path / "run", results)], tmp_path / "page"))
    assert "One seed" in text
    assert "Not settled" in text and "30 % (topk, d_sae 64, model)" in text


def test_a_models_own_heads_are_listed_apart(tmp_path):
    results = make_sweep()
    own = {"source": "cotrained", "ce_increase_at_half": None, "d_sae": "32-64"}
    results["compound"].append(row("model", None, 7, 0.05, sum_l0=14.0, **own))
    path = save(tmp_path / "run", results)
    assert variants(read_runs([path])) == [TOPK]
    assert "topk, 32-64 cotrained 7 – 14 0.0500" in text_of(
        write_swept_report([path], tmp_path / "page")
    )


def test_hostile_names_are_escaped(tmp_path):
    results = make_sweep("<script>alert(1)</script>")
    page = write_swept_report([save(tmp_path / "run", results)], tmp_path / "page")
    assert "<script" not in page.read_text("utf-8")


def test_the_page_is_whole(page):
    elements = elements_of(page)
    assert_self_contained(page, elements)
    assert_images_described(elements, number=4)
    assert_headings_nest(elements)


@needs_browser
def test_browser_shows_the_page_without_an_error(page, tmp_path):
    assert_shown(page, tmp_path, images=4)


@needs_browser
def test_the_page_can_be_used_by_keys_alone(page, tmp_path):
    assert_usable_by_keys(page, tmp_path)


def broken(**changes):
    results = make_sweep()
    results["rows"][0] |= changes
    return results


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "Cannot read .*results.json"),
        (broken(kl=float("nan")), r"rows\[0\]\.kl"),
        (make_sweep(at={}), "no SAE"),
        ({"rows": []}, "sites"),
    ],
)
def test_runs_that_cannot_be_shown_are_refused_in_one_sentence(tmp_path, content, named):
    if content is not None:
        save(tmp_path / "run", content)
    with pytest.raises(ReportError, match=named) as caught:
        write_swept_report([tmp_path / "run"], tmp_path / "page")
    assert "\n" not in str(caught.value)


def test_the_command_writes_the_page_that_fits(runs, tmp_path, capsys):
    cli.main(["report", *map(str, runs), "--output_dir", str(tmp_path / "swept")])
    assert "model (b)" in (tmp_path / "swept" / "index.html").read_text("utf-8")
    pair = save(tmp_path / "pair", make_results())
    cli.main(["report", str(pair)])
    assert "Where the regularized model is worse" in (pair / "index.html").read_text("utf-8")
    assert capsys.readouterr().out.count("Open ") == 2
    with pytest.raises(SystemExit, match="--output_dir"):
        cli.main(["report", *map(str, runs)])
