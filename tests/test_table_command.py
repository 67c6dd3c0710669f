"""`saereg table`: fine-tunings side by side, by hand and those that the README shows."""

import json
import re
from pathlib import Path

import pytest
from saereg_command import saereg
from test_swept_report import make_sweep, save

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "recipes" / "results" / "gpt2_base"


def make_run(folder, mode, ce, sweep=None, finished=True, **options):
    own = {"mode": mode, "reconstruction_weight": [0.1], "dataset": "text", "block_size": 8}
    figures = {"eval_ce": ce, "train_seconds": 61.4, "trained_parameters": 1200, "eval_loss": 1.0}
    if mode != "heads":
        figures["kl_to_base"] = 0.05
    record = {"options": own | options, "figures": figures if finished else None}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    if sweep:
        save(folder / "sweep", sweep)
    return folder


def table_of(printed):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]


def test_a_line_a_run_with_what_fresh_saes_cost_at_equal_l0(tmp_path, capsys):
    joint = make_sweep(at={10: (0.4, 0.6), 40: (0.1, 0.3)})  # Σ L0 20 and 80
    own = joint["compound"][0] | {"source": "cotrained", "seed": None, "sum_l0": 33.0}
    joint["compound"].append(own | {"ce_increase": 0.125})
    plain = make_sweep(at={20: (0.3, 0.5), 40: (0.2, 0.4)})  # Σ L0 40 and 80
    runs = [
        make_run(tmp_path / "plain", "plain", 4.5, plain),
        make_run(tmp_path / "joint", "joint", 4.625, joint),
        make_run(tmp_path / "heads", "heads", 4.75),
    ]
    assert saereg("table", *runs) is None
    head, rule, *lines = table_of(capsys.readouterr().out)
    assert head[-2:] == ["fresh topk, d_sae 64, Σ L0 40 / 57 / 80", "own heads (Σ L0)"]
    assert len(rule) == len(head) and set(rule) == {"---"}
    # half-way between 20 and 80 in log L0, the means of seeds fall from 0.5 to 0.2
    assert lines == [
        ["`plain`", "`plain`", "–", "1,200", "4.500", "0.050", "61", "0.400 / 0.350 / 0.300", "–"],
        [
            *["`joint`", "`joint`", "0.1", "1,200", "4.625", "0.050", "61"],
            *["0.350 / 0.275 / 0.200", "0.125 (33)"],
        ],
        ["`heads`", "`heads`", "0.1", "1,200", "4.750", "–", "61", "–", "–"],
    ]


def test_a_run_without_a_family_and_runs_without_an_l0_in_common_have_no_cost(tmp_path, capsys):
    first, second = make_sweep(at={10: (0.4, 0.6)}), make_sweep(at={40: (0.2, 0.4)})
    gated = make_sweep(at={10: (0.7, 0.7)})["compound"]
    first["compound"] += [line | {"family": "gated"} for line in gated]
    runs = [
        make_run(tmp_path / name, "joint", 4.5, own)
        for name, own in (("first", first), ("second", second))
    ]
    assert saereg("table", *runs) is None
    head, _, *lines = table_of(capsys.readouterr().out)
    assert head[7:9] == [
        "fresh topk, d_sae 64, Σ L0 none shared",
        "fresh gated, d_sae 64, Σ L0 20",
    ]
    assert [line[7:9] for line in lines] == [["–", "0.700"], ["–", "–"]]


def test_runs_without_sweeps_have_no_column_of_fresh_saes(tmp_path, capsys):
    assert saereg("table", make_run(tmp_path / "plain", "plain", 4.5)) is None
    head, _, line = table_of(capsys.readouterr().out)
    assert not any("fresh" in cell for cell in head) and len(line) == len(head)


@pytest.mark.parametrize(
    "own, sentence",
    [
        ({"finished": False}, "is not finished"),
        ({"dataset": "other"}, "dataset is 'text' in"),
        ({"mode": None}, "run.json: "),
    ],
    ids=["unfinished", "another text", "no mode"],
)
def test_what_cannot_stand_side_by_side_is_one_sentence(tmp_path, own, sentence):
    first = make_run(tmp_path / "first", "plain", 4.5)
    second = make_run(tmp_path / "second", **({"mode": "joint", "ce": 4.5} | own))
    assert sentence in saereg("table", first, second)
    assert "Cannot read" in saereg("table", tmp_path / "absent")


def test_the_table_of_the_readme_is_that_of_the_kept_results(capsys):
    readme = (REPOSITORY / "README.md").read_text()
    shown = re.findall(r"^\| `(gpt2_base_\w+[\w.]*)` \| `", readme, re.MULTILINE)
    kept = {path.name for path in RESULTS.iterdir()} - {"gpt2_base"}  # what they start from
    assert sorted(shown) == sorted(kept)
    assert saereg("table", *(RESULTS / name for name in shown)) is None
    assert capsys.readouterr().out in readme
