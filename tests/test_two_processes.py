"""Two processes train what one does, in every mode, and all that they tell each other is needed."""

from pathlib import Path

import pytest
import torch
from launching import launch_two
from training_job import SITES, WIDTH, heads
from two_processes_job import MODES, OTHERS, REDUCTIONS, trainings

from hf_saereg.heads import make_head
from hf_saereg.heads.folder import save_heads

EXACT = {"rtol": 1e-9, "atol": 1e-11}
JOB = Path(__file__).parent / "two_processes_job.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(3)
    save_heads([make_head(config).double() for config in heads(family="topk")], folder / "heads")
    launch_two(JOB, folder, timeout=300)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """The same on one process that accumulates."""
    (folder / "one").mkdir()
    (folder / "one" / "heads").symlink_to(folder / "heads")
    return dict(trainings(folder / "one", gradient_accumulation_steps=2))


def found(folder, name, rank=0):
    return torch.load(folder / f"{rank}_{name}.pt")


def differences(first, second):
    """Names of what two trainings differ in: tensors, and figures of logs."""
    names = [
        name
        for name, tensor in second["state"].items()
        if not torch.allclose(first["state"][name].double(), tensor.double(), **EXACT)
    ]
    assert len(first["log"]) == len(second["log"])
    for ours, theirs in zip(first["log"], second["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"epoch", "total_flos"}:
            if not name.endswith(("_runtime", "_per_second")):
                same = ours[name] == pytest.approx(theirs[name], rel=1e-5, nan_ok=True)
                names += [] if same else [name]
    return names


def test_they_are_two_and_saw_different_rows_with_unequal_padding(folder, one):
    first, second = (found(folder, "whole", rank) for rank in (0, 1))
    assert first["world_size"] == second["world_size"] == 2
    seen = [
        [tuple(row) for batch in part["seen"] for row in batch["input_ids"].tolist()]
        for part in (first, second)
    ]
    tokens = [[int(b["attention_mask"].sum()) for b in part["seen"]] for part in (first, second)]
    both_of_an_epoch = seen[0][:6] + seen[1][:6]  # 12 rows, 2 × 2 a step
    assert len(set(both_of_an_epoch)) == 12
    assert tokens[0] != tokens[1]
    together = [
        row
        for batches in zip(*(p["seen"] for p in (first, second)), strict=True)
        for batch in batches
        for row in batch["input_ids"].tolist()
    ]
    alone = [row for batch in one["whole"]["seen"] for row in batch["input_ids"].tolist()]
    assert together == alone  # the same data in the same global order


def test_only_the_main_process_describes_a_folder(folder):
    assert found(folder, "whole", rank=0)["described"] == {"training.json", "README.md"}
    assert found(folder, "whole", rank=1)["described"] == set()


@pytest.mark.parametrize("name", ["whole", "plain", *MODES])
def test_they_train_what_one_trains_that_accumulates(folder, one, name):
    assert differences(found(folder, name), one[name]) == []
    assert differences(found(folder, name, rank=1) | {"log": []}, one[name] | {"log": []}) == []
    names = {name for log in one[name]["log"] for name in log}
    if name in MODES:
        assert "eval_kl_to_base" in names
        assert ("kl_to_base" in names) == (name != "heads")
        assert any("lora_B" in n for n in one[name]["state"]) == (name != "heads")
    if name == "lora_frozen_heads":
        assert f"l0/{SITES[1]}" in names and one[name]["state"]["lm_head.weight"].shape[1] == WIDTH


@pytest.mark.parametrize("name", ["one row", "one row, frozen heads"])
def test_a_process_without_a_row_of_its_own_evaluates_with_the_others(folder, one, name):
    for rank in (0, 1):
        assert differences(found(folder, name, rank), one[name]) == []
    (figures,) = one[name]["log"]
    expected = "eval_spliced_loss" if "frozen" in name else f"eval_l0/{SITES[0]}"
    assert figures[expected] > 0


@pytest.mark.parametrize("reduction", REDUCTIONS + OTHERS)
def test_without_any_one_reduction_they_do_not(folder, one, reduction):
    assert differences(found(folder, f"without {reduction}"), one["whole"])


def test_without_heads_norms_are_of_both_processes_tokens(folder, one):
    assert any(name.startswith("x_norm/") for log in one["plain"]["log"] for name in log)
    assert differences(found(folder, "plain without read"), one["plain"])


def unequal(folder, name):
    """Names of tensors that are not the same on both processes."""
    first, second = (found(folder, name, rank)["state"] for rank in (0, 1))
    return [n for n, tensor in first.items() if not torch.equal(tensor, second[n])]


def test_both_resample_alike_although_their_tokens_differ(folder):
    assert unequal(folder, "resampled") == []
    own = unequal(folder, "resampled without broadcast")
    assert any(name.startswith("heads.") for name in own)


def test_both_resample_alike_where_one_has_no_token_to_read(folder):
    assert unequal(folder, "resampled, one without tokens") == []


def test_a_resumed_training_ends_on_the_same_bits(folder):
    for rank in (0, 1):
        whole, resumed = (found(folder, name, rank)["state"] for name in ("whole", "resumed"))
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), name
