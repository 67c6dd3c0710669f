"""`saereg quality` on a real sweep of a tiny model, and what the report shows of it."""

import json

import pytest
from keyboard import assert_usable_by_keys
from pages import assert_self_contained, assert_shown, elements_of, needs_browser
from saereg_command import saereg
from tiny_checkpoint import SITES, save_stock_model, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("quality")
    text = ("--dataset", write_text(folder / "text.txt"), "--use_cpu", "true")
    save_stock_model(folder / "model")
    grid = "--families topk --target_l0 3 --d_sae 24 40 --seeds 0 1 --max_steps 4 --warmup_steps 1"
    more = "--batch_size 2 --fidelity_blocks 2"
    saereg(
        "sweep",
        folder / "model",
        *text,
        *grid.split(),
        *more.split(),
        "--output_dir",
        folder / "run",
    )
    assert saereg("quality", folder / "run", *text, "--blocks", 6, "--parts", 2) is None
    return folder / "run"


def test_every_head_is_measured_beside_its_counterparts(run):
    found = json.loads((run / "quality.json").read_text())
    assert len(found["heads"]) == 2 * 2 * len(SITES)  # sizes, seeds
    assert {row["site"] for row in found["heads"]} == set(SITES)
    assert all(row["l0"] == pytest.approx(3, abs=0.01) for row in found["heads"])
    assert all(set(row["probes"]) >= {"vowel", "speaker"} for row in found["heads"])
    assert [row["seeds"] for row in found["consistency"]] == [[0, 1]] * 2 * len(SITES)
    assert [(row["d_sae"], row["wider"]) for row in found["composition"]] == (
        [(24, 40)] * 2 * len(SITES)
    )
    for row in found["composition"]:
        assert 0 < row["explained"][0] <= row["explained"][1] <= 1 + 1e-9


def test_the_report_shows_the_measures(run, tmp_path):
    assert saereg("report", run, "--output_dir", tmp_path) is None
    html = (tmp_path / "index.html").read_text()
    assert 'id="quality"' in html and "Not measured" not in html
    found = json.loads((run / "quality.json").read_text())["consistency"]
    matched = [row["matched"] for row in found if row["d_sae"] == 24]
    assert f"<td>{sum(matched) / len(matched):.3f} (" in html
    assert_self_contained(tmp_path / "index.html", elements_of(tmp_path / "index.html"))


@needs_browser
def test_browser_shows_the_measures_and_keys_reach_them(run, tmp_path):
    saereg("report", run, "--output_dir", tmp_path)
    assert_shown(tmp_path / "index.html", tmp_path, images=5)
    assert_usable_by_keys(tmp_path / "index.html", tmp_path)


def test_another_model_than_the_swept_one_is_refused(run):
    other = save_stock_model(run.parent / "other", seed=1)
    text = ("--dataset", run.parent / "text.txt", "--use_cpu", "true")
    said = saereg("quality", run, *text, "--models", other)
    assert "is not the model" in said and "\n" not in said
