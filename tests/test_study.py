"""Studies: several variants of a tiny job, in two shards, their table and figures."""

import json
import os
import shutil

import pytest
import yaml
from launching import REPOSITORY, start_two
from saereg_command import saereg
from tiny_recipe import configuration

from hf_saereg.commands.compare import main
from hf_saereg.errors import UserError
from hf_saereg.processes import ProcessesError
from hf_saereg.study import Study, StudyError, shard_of
from hf_saereg.study_cells import check_finished
from hf_saereg.study_l0 import L0Curve, keep_l0, l0_curves, steered_trainings
from hf_saereg.study_settings import settings_of
from hf_saereg.study_table import markdown, table

VARIANTS = {
    "plain": {"model": "plain"},
    "steered": {"architecture": "standard", "sparsity_coefficient": [0.01]},
    "sparser": {"architecture": "topk", "grid": {"k": [2]}},
    "as long": {"model": "plain", "train_seconds_of": "steered"},
    "untrained": {"model": "untrained"},
}
NAMES = ["plain", "steered", "sparser, k 2", "as long", "untrained"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of three variants at two seeds, its second shard run, then the first."""
    folder = tmp_path_factory.mktemp("study")
    own = {"sparsity_coefficient": None, "target_l0": [6.0]}
    base = configuration(folder, max_steps=6, fresh_steps=4, fresh_architectures=["topk"], **own)
    content = {"base": base.name, "seeds": [0, 1], "variants": VARIANTS}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ["--study", folder / "study.yaml", "--output_dir", folder / "out"]
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    main([*map(str, words), "--shard", "1", "2"])
    halfway = (folder / "out" / "table.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*/*/cell.json")}
    main([*map(str, words)])
    return folder, halfway, stamps


def cell(variant, seed, eval_ce, seconds, increase):
    spectrum = {"a": [0.5, 0.5], "b": [1.0, 0.0]}
    point = {"source": "fresh", "family": "topk", "sparsity": 5}
    return {
        "variant": variant,
        "seed": seed,
        "figures": {"eval_ce": eval_ce, "train_seconds": seconds},
        "scores": {
            "baselines": {"residual_norm": {"a": 2.0, "b": 3.0}, "spectrum": spectrum},
            "compound": [point | {"ce_increase": increase, "sum_l0": 10.0}],
            "rows": [point | {"ce_increase": increase / n} for n in (2, 4)],
        },
    }


def test_every_cell_is_trained_scored_and_kept(study):
    folder, _, _ = study
    for variant in NAMES:
        for seed in (0, 1):
            found = json.loads(
                (folder / "out" / variant / f"seed_{seed}" / "cell.json").read_text()
            )
            assert (found["variant"], found["seed"]) == (variant, seed)
            assert found["figures"]["eval_ce"] > 0 and found["scores"]["compound"]
    for name in (
        "figures/trade_off.png",
        "figures/trade_off.svg",
        "figures/l0.png",
        "figures/l0.svg",
        "study.json",
        "index.html",
    ):
        assert (folder / "out" / name).stat().st_size > 0


def test_shards_together_are_the_whole_and_nothing_runs_twice(study):
    _, halfway, stamps = study
    assert len(stamps) == 4  # the control waits for cells of the other shard
    assert "| steered | 1 |" not in halfway  # its pair at the same seed was still missing
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_only_the_variants_asked_for_are_run(study):
    folder = study[0]
    asked, other = (
        folder / "out" / name / "seed_0" / "cell.json" for name in ("untrained", "sparser, k 2")
    )
    kept = other.read_text()
    asked.unlink()
    other.unlink()
    words = ["--study", folder / "study.yaml", "--output_dir", folder / "out", "--only", "unt*"]
    main([*map(str, words)])
    assert asked.exists() and not other.exists()
    other.write_text(kept)
    main([*map(str, words)])  # which compares all that is finished


def test_finished_cells_of_other_options_are_refused(study, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(study[0], folder)
    words = ["--study", str(folder / "study.yaml"), "--output_dir", str(folder / "out")]
    main(words)  # elsewhere, and still the same
    assert "cannot be checked" not in capsys.readouterr().out
    content = yaml.safe_load((folder / "study.yaml").read_text())
    content["variants"]["steered"]["reconstruction_weight"] = [2.0]
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=r"steered.*reconstruction_weight was .* now \[2\.0\]"):
        main(words)
    (folder / "out" / "steered" / "seed_0" / "run.json").unlink()
    (folder / "out" / "steered" / "seed_1" / "run.json").unlink()
    main(words)
    assert "2 finished cells have no run.json beside them" in capsys.readouterr().out


def test_a_pattern_that_no_variant_matches_is_refused(study):
    read = Study.read(study[0] / "study.yaml")
    assert read.cells_of(["as long", "plain"]) == [
        (variant, seed) for seed in (0, 1) for variant in ("plain", "as long")
    ]
    with pytest.raises(StudyError, match=r"no variant 'sparser'; it has 'plain', .*'sparser, k 2'"):
        read.cells_of(["plain", "sparser"])


def test_the_table_has_a_line_a_variant(study):
    whole, by_site = (study[0] / "out" / "table.md").read_text().split("\n\n")
    for text in (whole, by_site):
        lines = text.splitlines()
        assert [line.split("|")[1].strip() for line in lines[2:]] == NAMES
    assert all(line.split("|")[2].strip() == "2" for line in whole.splitlines()[2:])


def test_variants_are_compared_with_the_first_at_the_same_seed():
    cells = [
        *(cell("plain", seed, 2.0 + seed, 10.0 * (1 + seed), 0.4) for seed in (0, 1)),
        *(cell("other", seed, 2.25 + seed, 30.0 * (1 + seed), 0.1 * seed) for seed in (0, 1)),
    ]
    plain, other = table(cells, "plain")
    assert other["ce_cost"] == [0.25, 0.25] and plain["ce_cost"] == [0, 0]
    assert other["relative_time"] == 3.0
    assert other["norms"] == [2.0, 3.0]
    assert other["effective_ranks"] == pytest.approx([2.0, 1.0])
    assert [c["ce_increase"] for c in other["compound"]["fresh topk 5"]] == [0.0, 0.1]
    assert other["sites"]["fresh topk 5"] == pytest.approx([0.025, 0.0125])
    assert "| other | 2 | 2.750 | +0.250 | 3.00 |" in markdown([plain, other])
    assert "| other | 0.025, 0.013 |" in markdown([plain, other])


def test_a_seed_without_its_first_variant_is_left_out():
    cells = [cell("plain", 0, 2.0, 10.0, 0.4), cell("other", 1, 2.0, 10.0, 0.4)]
    assert [row["variant"] for row in table(cells, "plain")] == ["plain"]
    assert table(cells, "absent") == []


def test_a_curve_has_settled_once_it_never_leaves_the_band_again():
    log = [
        {"step": step, "loss": 1.0, "l0/blocks.0.hook_resid_pre": l0}
        for step, l0 in [(10, 200.0), (20, 10.5), (30, 12.0), (40, 10.9), (50, 9.1)]
    ]
    curve = l0_curves(log)["blocks.0.hook_resid_pre"]
    assert curve == L0Curve([10, 20, 30, 40, 50], [200.0, 10.5, 12.0, 10.9, 9.1])
    assert curve.settled_at(10) == 40
    assert curve.settled_at(30) is None


def test_l0_of_steered_cells_outlives_their_logs(study, tmp_path):
    folder = tmp_path / "kept"
    shutil.copytree(study[0] / "out", folder, ignore=shutil.ignore_patterns("trainer_state.json"))
    found = Study.read(study[0] / "study.yaml")
    (steered,) = steered_trainings(found, settings_of(found), folder)
    assert (steered.variant, steered.seed) == ("steered", 0)
    assert set(steered.targets.values()) == {6.0} and list(steered.curves) == list(steered.targets)
    state = study[0] / "out" / "steered" / "seed_0" / "regularized" / "trainer_state.json"
    assert steered.curves == l0_curves(json.loads(state.read_text())["log_history"])
    assert sorted(path.parent.parent.name for path in folder.glob("*/*/l0.json")) == ["steered"] * 2


def test_l0_of_a_cell_is_kept_while_its_log_is_there(study, tmp_path):
    shutil.copytree(study[0] / "out" / "steered" / "seed_1", tmp_path / "steered" / "seed_1")
    own = tmp_path / "steered" / "seed_1"
    before = (own / "l0.json").read_bytes()
    (own / "l0.json").unlink()
    assert keep_l0("steered", 1, tmp_path) and (own / "l0.json").read_bytes() == before
    (own / "regularized" / "trainer_state.json").unlink()
    assert keep_l0("steered", 1, tmp_path)
    (own / "l0.json").unlink()
    assert not keep_l0("steered", 1, tmp_path) and not (own / "l0.json").exists()


@pytest.mark.parametrize(
    "content, culprit",
    [
        ({"base": "b.yaml", "seeds": [0]}, "variants"),
        ({"base": "b.yaml", "seeds": [], "variants": {"a": {}}}, "nothing to run"),
        ({"base": "b.yaml", "seeds": [0], "variants": {"../a": {}}}, "'../a'"),
        (["base"], "keys"),
        ({"base": 3, "seeds": [0], "variants": {"a": {}}}, "base in"),
        ({"base": "b.yaml", "seeds": [0], "variants": {"a": {"model": "untrained"}}}, "'a'"),
    ],
)
def test_a_study_that_cannot_run_is_refused_in_one_sentence(tmp_path, content, culprit):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(StudyError, match=culprit) as caught:
        Study.read(tmp_path / "study.yaml")
    assert "\n" not in str(caught.value)


def test_a_study_that_is_no_yaml_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "study.yaml").write_text("base: [\n")
    with pytest.raises(StudyError, match=r"study\.yaml: .*line 2") as caught:
        Study.read(tmp_path / "study.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_study_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"absent\.yaml"):
        Study.read(tmp_path / "absent.yaml")


def test_a_mistake_in_the_last_variant_shows_before_the_first_is_trained(tmp_path):
    base = configuration(tmp_path, max_steps=6, sparsity_coefficient=None, target_l0=[6.0])
    variants = {"plain": {"model": "plain"}, "wrong": {"architecture": "topk", "k": [49]}}
    content = {"base": base.name, "seeds": [0], "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="k at"):
        main(["--study", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "plain" / "seed_0" / "plain").exists()


def test_several_processes_are_refused_before_anything_else(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProcessesError, match=r"2 processes were launched.*--shard 0 2") as caught:
        main(["--study", "absent.yaml"])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_recipe_that_is_launched_twice_names_shards():
    recipe = REPOSITORY / "recipes" / "study_character.py"
    done = start_two(recipe, "--study", "absent.yaml", timeout=600)
    assert done.returncode != 0 and "error: 2 processes were launched" in done.stderr
    assert "--shard 0 2" in done.stderr and "absent.yaml" not in done.stderr


@pytest.mark.parametrize(
    "name, options, culprit",
    [
        ("untrained", {"model": "plain"}, "model was 'untrained', now 'plain'"),
        ("as long", {"model": "plain", "train_seconds_of": "sparser"}, "train_seconds_of was"),
    ],
)
def test_a_finished_cell_of_another_kind_is_refused(study, tmp_path, name, options, culprit):
    folder, *_ = study
    variants = {**VARIANTS, "sparser": {"architecture": "topk", "k": [2]}, name: options}
    base = str(Study.read(folder / "study.yaml").base)
    content = {"base": base, "seeds": [0, 1], "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    changed = Study.read(tmp_path / "study.yaml")
    assert check_finished(Study.read(folder / "study.yaml"), name, 0, folder / "out")
    with pytest.raises(StudyError, match=culprit):
        check_finished(changed, name, 0, folder / "out")


def test_a_point_where_two_curves_meet_is_on_both(tmp_path):
    base = configuration(tmp_path, max_steps=6, sparsity_coefficient=None, target_l0=[6.0])
    variants = {
        "plain": {"model": "plain"},
        "weight": {"grid": {"reconstruction_weight": [1.0, 3.0]}},
        "sparsity": {"reconstruction_weight": [3.0], "grid": {"target_l0": [[2.0], [9.0]]}},
    }
    content = {"base": base.name, "seeds": [0], "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    found = settings_of(Study.read(tmp_path / "study.yaml"))
    shared = found["weight, reconstruction_weight 3.0"]
    assert (shared["knob"], shared["weight"]) == ("reconstruction_weight", 3.0)
    ((curve, weight),) = shared["also"].items()
    assert weight == 6.0
    others = [own for name, own in found.items() if name.startswith("sparsity")]
    assert {own["curve"] for own in others} == {curve}
    assert [own["weight"] for own in others] == [2.0, 9.0]
    assert not found["weight, reconstruction_weight 1.0"]["also"]


@pytest.mark.parametrize("shard", [[2, 2], [-1, 2], [0], [0, 0]])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(StudyError, match="shard"):
        shard_of([("a", 0)], shard)


def test_a_control_trains_the_steps_that_were_written_down(study):
    for seed in (0, 1):
        own = study[0] / "out" / "as long" / f"seed_{seed}"
        found = json.loads((own / "cell.json").read_text())
        budget = json.loads((own / "budget.json").read_text())
        wanted = budget["train_seconds"] / budget["plain_seconds_per_step"]
        assert found["figures"]["steps"] == budget["max_steps"] == max(1, round(wanted))
        assert found["budget"] == budget


def test_an_untrained_model_predicts_like_chance(study):
    found = json.loads((study[0] / "out" / "untrained" / "seed_0" / "cell.json").read_text())
    assert found["figures"]["steps"] == 0
    assert found["figures"]["eval_ce"] == pytest.approx(4.852, abs=0.1)  # ln 128


def test_the_heads_of_a_pair_of_cells_are_measured(study, capsys):
    pytest.importorskip("scipy")
    pair = [study[0] / "out" / name / "seed_0" for name in ("plain", "steered")]
    text = ("--dataset", study[0] / "text.txt", "--blocks", 4, "--use_cpu", "true")
    assert saereg("quality", *pair, *text) is None
    said = capsys.readouterr().out
    for own in pair:
        content = json.loads((own / "cell.json").read_text())
        name, scored = content["variant"], content["scores"]["rows"]
        rows = json.loads((own / "quality.json").read_text())["heads"]
        assert {row["model"] for row in rows} == {name} and f"on {name}: L0" in said
        wanted = sorted((row["source"], row["site"], row["d_sae"]) for row in scored)
        assert sorted((row["source"], row["site"], row["d_sae"]) for row in rows) == wanted
    assert "saereg report" not in said  # which has no page for a cell


def test_a_cell_whose_model_was_never_saved_cannot_be_measured(study):
    pytest.importorskip("scipy")
    untrained = study[0] / "out" / "untrained" / "seed_0"
    said = saereg("quality", untrained, "--dataset", study[0] / "text.txt", "--use_cpu", "true")
    assert "has no model to measure" in said and "\n" not in said
    assert not (untrained / "quality.json").exists()


def test_cotrained_heads_are_scored_on_the_baseline_too(study):
    content = json.loads((study[0] / "out" / "study.json").read_text())
    moved = {(row["variant"], row["seed"]) for row in content["transplanted"]}
    assert moved == {(name, seed) for name in ("steered", "sparser, k 2") for seed in (0, 1)}
    assert all(row["compound"]["sum_l0"] > 0 for row in content["transplanted"])


@pytest.mark.parametrize(
    "options, culprit",
    [
        ({"model": "other"}, "choose one of"),
        ({"grid": {"k": 3}}, "list of values"),
        ({"k": [1], "grid": {"k": [3]}}, "twice"),
        ({"model": "plain", "train_seconds_of": "absent"}, "'absent'"),
        ({"train_seconds_of": "a"}, "model: plain"),
    ],
)
def test_a_variant_that_cannot_be_is_refused_in_one_sentence(tmp_path, options, culprit):
    variants = {"a": {"model": "plain"}, "b": options}
    content = {"base": "b.yaml", "seeds": [0], "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(StudyError, match=culprit) as caught:
        Study.read(tmp_path / "study.yaml")
    assert "\n" not in str(caught.value)
