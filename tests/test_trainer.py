"""The trainer: what adds up, what is logged, what is saved, and what comes back."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.fsdp import MixedPrecisionPolicy
from training_job import (
    CONTEXT,
    LENGTHS,
    SITES,
    WIDTH,
    Gradients,
    arguments,
    collate,
    heads,
    lose_a_weight,
    rows,
    run,
    summed_ce,
    tiny_model,
    trainer,
    upkept_heads,
    weights,
)
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from hf_saereg import processes
from hf_saereg.checkpoint import CheckpointError
from hf_saereg.errors import UserError
from hf_saereg.heads import HeadConfigError, SAEHeadConfig
from hf_saereg.heads.folder import TRAINING_FILE, HeadFolderError
from hf_saereg.regularizer import TermOptions
from hf_saereg.resuming import SESSION_FILE, STATE_FILE, last_complete_checkpoint
from hf_saereg.trainer import NonFiniteLossError, SAERegArguments

REPOSITORY = Path(__file__).parents[1]
TWO_PROCESSES = REPOSITORY / "recipes" / "accelerate" / "cpu_2.yaml"
EXACT = {"rtol": 1e-9, "atol": 1e-11}


# ---- what adds up ----


def gradients(folder, model, train, micro_batches):
    """Gradients with which the trainer steps, the rows split evenly into micro-batches."""
    kept = Gradients()
    args = arguments(
        folder,
        per_device_train_batch_size=len(train) // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    trainer(model, args, train, callbacks=[kept]).train()
    return kept.by_name


def gradients_by_hand(model, train, micro_batches):
    """The definition: CE over all predicted tokens, terms weighted by their share of the tokens."""
    size = len(train) // micro_batches
    parts = [collate(train[i : i + size]) for i in range(0, len(train), size)]
    predicted = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    tokens = sum(int(part["attention_mask"].sum()) for part in parts)
    loss = torch.zeros((), dtype=torch.float64)
    for part in parts:
        output = model(**part)
        loss = loss + summed_ce(output.logits, part["labels"]) / predicted
        loss = loss + output.term * part["attention_mask"].sum() / tokens
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, **EXACT, msg=name)


@pytest.mark.parametrize("micro_batches", [2, 6, 12])
def test_accumulated_means_over_tokens_match_one_large_batch(tmp_path, micro_batches):
    """CE and S, with micro-batches of unequal token counts."""
    without_ratio = heads(reconstruction_weight=0.0)
    whole = gradients(tmp_path, tiny_model(without_ratio), rows(), micro_batches=1)
    assert_same(whole, gradients_by_hand(tiny_model(without_ratio), rows(), 1))
    assert_same(gradients(tmp_path, tiny_model(without_ratio), rows(), micro_batches), whole)


@pytest.mark.parametrize("splice_loss", ["ce", "kl"])
@pytest.mark.parametrize("micro_batches", [2, 6])
def test_the_spliced_loss_and_the_layer_norm_term_match_one_large_batch(
    tmp_path, micro_batches, splice_loss
):
    def job():
        return tiny_model(
            upkept_heads(), term=TermOptions(splice_weight=2, splice_loss=splice_loss)
        )

    whole = gradients(tmp_path, job(), rows(), micro_batches=1)
    assert_same(gradients(tmp_path, job(), rows(), micro_batches), whole)
    model = job()
    output = model(**collate(rows()))
    (output.loss + output.term + 2 * output.spliced_loss).backward()
    assert_same(whole, {name: p.grad for name, p in model.named_parameters()})


def test_the_terms_warm_up_weighs_term_and_spliced_loss(tmp_path):
    term = TermOptions(splice_weight=2, term_warmup=[0, 4])
    found = gradients(tmp_path, tiny_model(upkept_heads(), term=term), rows(), micro_batches=1)
    model = tiny_model(upkept_heads(), term=term)
    output = model(**collate(rows()))
    (output.loss + (output.term + 2 * output.spliced_loss) / 4).backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("family", ["standard", "topk"])
@pytest.mark.parametrize("micro_batches", [1, 6])
def test_the_ratio_is_taken_per_micro_batch_and_weighted_by_tokens(tmp_path, family, micro_batches):
    configs = heads(reconstruction_weight=3.0, family=family)
    found = gradients(tmp_path, tiny_model(configs), rows(), micro_batches)
    assert_same(found, gradients_by_hand(tiny_model(configs), rows(), micro_batches))


def test_the_ratio_of_one_large_batch_is_another(tmp_path):
    """Otherwise the test above could not tell one way from the other."""
    configs = heads(reconstruction_weight=3.0)
    whole = gradients_by_hand(tiny_model(configs), rows(), 1)
    parts = gradients_by_hand(tiny_model(configs), rows(), 6)
    name = "heads.blocks_0_hook_resid_pre.W_dec"
    assert (whole[name] - parts[name]).norm() / whole[name].norm() > 1e-4


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_the_terms_weight_does_not_depend_on_the_number_of_micro_batches(tmp_path, micro_batches):
    configs = heads(reconstruction_weight=3.0)
    block = rows([12, 5, 9])
    once = gradients(tmp_path, tiny_model(configs), block, micro_batches=1)
    repeated = block * micro_batches
    assert_same(gradients(tmp_path, tiny_model(configs), repeated, micro_batches), once)


@pytest.fixture(scope="module", params=["published", "upkept"])
def two_processes(tmp_path_factory, request):
    """Folder of a run on two processes, and of the same on one."""
    folder, options = tmp_path_factory.mktemp("two"), {"max_steps": 4, "logging_steps": 2}
    options["kind"] = request.param
    options |= {"train_sampling_strategy": "random", "eval_strategy": "steps", "eval_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 4}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES]
    job = [*launch, REPOSITORY / "tests" / "training_job.py", folder]
    done = subprocess.run(
        [*map(str, job), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "one").mkdir()
    run(folder / "one", 0, options | {"gradient_accumulation_steps": 2})
    return folder


def figures(folder, rank):
    return json.loads((folder / f"figures_{rank}.json").read_text())


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one_that_accumulates(two_processes):
    assert [figures(two_processes, rank)["world_size"] for rank in (0, 1)] == [2, 2]
    two, one = weights(two_processes / "rank_0"), weights(two_processes / "one" / "rank_0")
    initial = tiny_model(heads(0.0)).state_dict()
    assert two.keys() == one.keys() and len(two) > len(SITES)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, **EXACT, msg=name)
    assert not torch.equal(one["transformer.wte.weight"], initial["transformer.wte.weight"])


@pytest.mark.slow
def test_counters_and_coefficients_are_the_same_on_every_process(two_processes):
    first, second, one = (
        figures(folder, rank)["state"]
        for folder, rank in ((two_processes, 0), (two_processes, 1), (two_processes / "one", 0))
    )
    assert first == second
    assert first.keys() == one.keys()
    for name, value in one.items():
        assert first[name] == pytest.approx(value, rel=1e-6), name
    if "blocks_0_hook_resid_pre.steered_coefficient" in one:  # the heads that keep most
        since_fired = one["blocks_1_hook_resid_post.tokens_since_fired"]
        assert any(since_fired) and not all(since_fired)  # some fired lately, some did not


@pytest.mark.slow
def test_two_processes_log_what_one_logs(two_processes):
    two, one = (figures(folder, 0)["log"] for folder in (two_processes, two_processes / "one"))
    assert len(two) == len(one) == 4  # two windows, an evaluation, the end
    for ours, expected in zip(two, one, strict=True):
        assert ours.keys() == expected.keys()
        for name in expected.keys() - {"epoch", "step"}:
            if not name.endswith(("_runtime", "_per_second", "total_flos")):
                assert ours[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.slow
def test_only_the_main_process_writes(two_processes):
    """But for the other one's random state."""
    other = [path.name for path in (two_processes / "rank_1").rglob("*") if path.is_file()]
    assert other == ["rng_state_1.pth"]


# ---- figures ----


def test_evaluation_loss_is_plain_cross_entropy(tmp_path):
    model = tiny_model(heads(3.0), dtype=torch.float32)
    lengths = [12, 3, 7, 12, 5]  # a batch of one row is the last
    ours = trainer(model, arguments(tmp_path), eval_dataset=rows(lengths))
    found = ours.evaluate()
    ours.save_model()
    batch = collate(rows(lengths))
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(stock(**batch).loss.item(), rel=1e-6)
        parts = [rows(lengths)[i : i + 2] for i in (0, 2, 4)]
        terms = [model(**collate(part)).term.item() for part in parts]
    expected = sum(t * n for t, n in zip(terms, (15, 19, 5), strict=True)) / 39  # by tokens
    assert found["eval_term"] == pytest.approx(expected, rel=1e-6)
    assert found["eval_objective"] == pytest.approx(found["eval_loss"] + found["eval_term"])
    assert found["eval_term"] > 0.01
    for site in SITES:
        for name in ("l0", "fvu", "dead_fraction", "x_norm"):
            assert math.isfinite(found[f"eval_{name}/{site}"])


def padded_on_the_left(right):
    """The same rows, moved to the right end; no padding predicts their first token."""
    moved = []
    for row in right:
        gap = CONTEXT - int(row["attention_mask"].sum())
        moved.append({name: tensor.roll(gap) for name, tensor in row.items()})
        moved[-1]["labels"][gap] = -100
    return moved


def test_the_side_of_padding_changes_neither_training_nor_evaluation(tmp_path):
    """Nor the start of `b_dec`, the base that KL is measured from, and fidelity."""
    found = {}
    for side, own in (("right", rows()), ("left", padded_on_the_left(rows()))):
        options = {"anchor_weight": 0.5, "eval_base": True, "eval_fidelity": True}
        args = arguments(tmp_path / side, max_steps=3, b_dec_init="mean", **options)
        model = tiny_model(heads())
        ours = trainer(model, args, own, eval_dataset=own)
        ours.train()
        figures = {name: value for name, value in ours.evaluate().items() if "per_sec" not in name}
        found[side] = figures, model.state_dict()
    (left, left_weights), (right, right_weights) = found["left"], found["right"]
    assert left.keys() == right.keys() and left["eval_kl_to_base"] > 1e-3
    for name in left.keys() - {"eval_runtime"}:
        assert left[name] == pytest.approx(right[name], rel=1e-6), name
    for name, tensor in right_weights.items():
        torch.testing.assert_close(left_weights[name], tensor, **EXACT, msg=name)


def test_an_evaluation_reads_every_row_where_training_drops_a_last_batch(tmp_path):
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4)
    lengths = [12, 3, 7, 12, 5, 8]  # one batch and a half
    model = tiny_model(dtype=torch.float32)
    ours = trainer(model, args, rows()[:3], eval_dataset=rows(lengths))
    assert len(ours.get_train_dataloader()) == 1 and len(ours.get_test_dataloader(rows()[:6])) == 2
    with torch.no_grad():
        expected = model.eval()(**collate(rows(lengths))).loss.item()
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert args.dataloader_drop_last


def test_an_evaluation_of_no_row_is_refused(tmp_path):
    with pytest.raises(UserError, match="give eval_dataset at least one row"):
        trainer(tiny_model(), arguments(tmp_path), eval_dataset=[]).evaluate()


def test_without_heads_the_objective_is_the_loss(tmp_path):
    ours = trainer(tiny_model(), arguments(tmp_path), eval_dataset=rows())
    ours.train()
    found = ours.evaluate()
    assert found["eval_objective"] == found["eval_loss"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_heads_norms_are_of_the_tokens_of_logged_steps(tmp_path, checkpointing):
    """Two steps an epoch of three unequal micro-batches; nothing is learned."""
    model = tiny_model()
    args = arguments(
        tmp_path,
        learning_rate=0.0,
        max_steps=3,
        logging_steps=2,
        gradient_accumulation_steps=3,
        gradient_checkpointing=checkpointing,
    )
    ours = trainer(model, args)
    ours.train()
    log = ours.state.log_history[0]
    batch = collate(rows()[6:])
    with torch.no_grad(), model.reading(SITES) as activations:
        model(**batch)
    for site in SITES:
        expected = activations[site][batch["attention_mask"].bool()].norm(dim=-1).mean().item()
        assert log[f"x_norm/{site}"] == pytest.approx(expected, rel=1e-12)
    assert log["step"] == 2


def test_without_heads_the_first_step_is_read_if_it_is_logged(tmp_path):
    args = arguments(tmp_path, max_steps=2, logging_steps=5, logging_first_step=True)
    ours = trainer(tiny_model(), args)
    ours.train()
    logged = [log["step"] for log in ours.state.log_history if f"x_norm/{SITES[0]}" in log]
    assert logged == [1]


def window_by_hand(model, micro_batches):
    """Figures of each site over the tokens of all micro-batches together, and the term."""
    figures, term = {}, 0.0
    for site in SITES:
        head, xs = model.heads[site], []
        with torch.no_grad(), model.reading([site]) as activations:
            for batch in micro_batches:
                model(**batch, compute_term=False)
                xs.append(activations[site][batch["attention_mask"].bool()])
            x = torch.cat(xs)
            features = head.encode(x)
            error = (x - head.decode(features)).square().sum()
            figures[f"l0/{site}"] = (features != 0).sum().item() / len(x)
            figures[f"fvu/{site}"] = (error / (x - x.mean(dim=0)).square().sum()).item()
            figures[f"dead_fraction/{site}"] = ((features != 0).sum(dim=0) == 0).double().mean()
            figures[f"x_norm/{site}"] = x.norm(dim=-1).mean().item()
            figures[f"reconstruction/{site}"] = error.item() / len(x)
            penalty = 0.1 * (features * head.W_dec.norm(dim=1)).sum().item() / len(x)
            figures[f"sparsity/{site}"] = penalty
            figures[f"coefficient/{site}"] = 0.1
            for part in xs:
                r = (part - head(part)).square().sum() / len(part)
                ratio = 3.0 * r / part.norm(dim=-1).mean()
                term += ratio.item() * len(part) / len(x) / len(SITES)
            term += penalty / len(SITES)
    return figures | {"term": term}


def test_a_log_window_averages_over_tokens(tmp_path):
    """Two steps of three unequal micro-batches; nothing is learned, so all are of one model."""
    model = tiny_model(heads(3.0))
    args = arguments(
        tmp_path,
        learning_rate=0.0,
        max_steps=2,
        logging_steps=2,
        gradient_accumulation_steps=3,
        report_to="tensorboard",
    )
    ours = trainer(model, args)
    ours.train()
    log = ours.state.log_history[0]
    micro_batches = [collate(rows()[i : i + 2]) for i in range(0, len(LENGTHS), 2)]
    for name, expected in window_by_hand(model, micro_batches).items():
        assert log[name] == pytest.approx(float(expected), rel=1e-5), name
    steps = [collate(rows()[:6]), collate(rows()[6:])]
    with torch.no_grad():
        ce = [
            summed_ce(model(**step).logits, step["labels"]) / (step["labels"][:, 1:] != -100).sum()
            for step in steps
        ]
    assert log["ce"] == pytest.approx(sum(ce).item() / 2, rel=1e-6)
    assert log["term_share"] == pytest.approx(1 - log["ce"] / log["loss"])
    assert_in_tensorboard(tmp_path, "train", log)


def test_loss_is_ce_plus_term_for_blocks_of_one_length(tmp_path):
    model = tiny_model(heads(3.0))
    args = arguments(tmp_path, max_steps=3, logging_steps=3, gradient_accumulation_steps=2)
    ours = trainer(model, args, rows([12] * 12))
    ours.train()
    log = ours.state.log_history[0]
    assert log["loss"] == pytest.approx(log["ce"] + log["term"], rel=1e-6)
    assert log["term"] > 0.01 * log["ce"]


def test_every_window_starts_anew(tmp_path):
    ours = trainer(tiny_model(heads(3.0)), arguments(tmp_path, learning_rate=0.0, max_steps=12))
    ours.train()
    first_epoch, second_epoch = ours.state.log_history[:6], ours.state.log_history[6:12]
    for before, again in zip(first_epoch, second_epoch, strict=True):
        for name in before.keys() - {"epoch", "step"}:
            assert again[name] == pytest.approx(before[name], rel=1e-6), name


def test_evaluation_leaves_the_training_window_alone(tmp_path):
    options = {"learning_rate": 0.0, "max_steps": 4, "logging_steps": 4}
    logs = []
    for extra in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        args = arguments(tmp_path, **options, **extra)
        ours = trainer(tiny_model(heads(3.0)), args, eval_dataset=rows(seed=9))
        ours.train()
        logs.append(next(log for log in ours.state.log_history if "loss" in log))
    assert logs[0] == logs[1]


def test_evaluation_figures_reach_tensorboard(tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, report_to="tensorboard")
    ours = trainer(tiny_model(heads(3.0)), args, eval_dataset=rows())
    ours.train()
    log = next(log for log in ours.state.log_history if "eval_loss" in log)
    scalars = {name.removeprefix("eval_"): value for name, value in log.items()}
    assert f"l0/{SITES[0]}" in scalars
    assert_in_tensorboard(tmp_path, "eval", scalars)


def assert_in_tensorboard(folder, prefix, log):
    (events,) = folder.glob("runs/*/events*")
    accumulator = EventAccumulator(str(events)).Reload()
    for name, value in log.items():
        if name not in ("epoch", "step"):
            (scalar,) = accumulator.Scalars(f"{prefix}/{name}")
            assert scalar.value == pytest.approx(value, rel=1e-6), name


# ---- optimizer ----


class Wrapped(torch.nn.Module):
    """Names as `DistributedDataParallel` gives them, without its processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["plain", "as under DDP"])
def test_weight_decay_is_for_matrices_of_the_language_model_alone(tmp_path, wrap):
    model = tiny_model(heads())
    names = trainer(model, arguments(tmp_path)).get_decay_parameter_names(wrap(model))
    layer = ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    blocks = [f"transformer.h.{i}.{name}" for i in (0, 1) for name in layer]
    expected = {"transformer.wte.weight", "transformer.wpe.weight", *blocks}
    assert {name.removeprefix("module.") for name in names} == expected


def test_the_optimizer_decays_these_and_trains_all(tmp_path):
    model = tiny_model(heads())
    ours = trainer(model, arguments(tmp_path, weight_decay=0.1))
    groups = {g["weight_decay"]: g["params"] for g in ours.create_optimizer().param_groups}
    decayed = {id(p) for p in groups[0.1]}
    others = {id(p) for p in groups[0.0]}
    assert {id(p) for p in model.heads.parameters()} <= others
    assert len(decayed) == 10
    assert decayed | others == {id(p) for p in model.parameters()}


# ---- resume ----

RESUMABLE = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 4,
    "gradient_accumulation_steps": 2,
    "resample_every": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-3},
    "train_sampling_strategy": "random",  # 3 steps an epoch: the stop lies within the second
}


class KilledError(RuntimeError):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


STATEFUL = TermOptions(token_fraction=0.5, sites_per_step=2, splice_weight=0.3, splice_sites=2)


def stateful_heads():
    """Every kind of state that a head keeps beside its weights."""
    shared = {"d_in": 8, "d_sae": 24, "dead_after_tokens": 60, "reconstruction_weight": 3.0}
    spread = {"normalization": "variance", "unit_decoder_norm": True}
    return [
        SAEHeadConfig("standard", SITES[0], target_l0=4, tied=True, **shared | spread),
        SAEHeadConfig("batchtopk", SITES[1], k=3, auxk=5, **shared),
        SAEHeadConfig("jumprelu", SITES[2], target_l0=4, **shared),
    ]


def resumable(folder, seed=0, **changes):
    callbacks = changes.pop("callbacks", [])
    model = tiny_model(stateful_heads(), dropout=0.1, seed=seed, dtype=torch.float32, term=STATEFUL)
    return trainer(model, arguments(folder, **(RESUMABLE | changes)), callbacks=callbacks)


def same_weights(one, other):
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    ours = resumable(tmp_path_factory.mktemp("uninterrupted"))
    ours.train()
    return ours


@pytest.fixture
def interrupted(tmp_path):
    """A run's folder left during its seventh step; its last checkpoint is of the fourth."""
    with pytest.raises(KilledError):
        resumable(tmp_path, callbacks=[StopAt(6)]).train()
    return tmp_path


def resumed(folder, step=4):
    """Another process's model has other weights before it resumes."""
    ours = resumable(folder, seed=5)
    ours.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return ours


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(interrupted, uninterrupted):
    assert last_complete_checkpoint(interrupted).name == "checkpoint-4"
    ours = resumed(interrupted)
    assert ours.state.global_step == 8
    assert same_weights(ours, uninterrupted)
    logs = [
        [{k: v for k, v in log.items() if not k.startswith(("train_", "total"))} for log in history]
        for history in (ours.state.log_history, uninterrupted.state.log_history)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "state", ["model.safetensors", "saes", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_every_saved_state_is_needed_to_resume(interrupted, uninterrupted, state):
    saved = interrupted / "checkpoint-4" / state
    shutil.rmtree(saved) if saved.is_dir() else saved.unlink()
    try:
        ours = resumed(interrupted)
    except (OSError, UserError):
        return
    assert not same_weights(ours, uninterrupted)


@pytest.mark.parametrize("site", SITES)
def test_what_heads_keep_beside_their_weights_is_needed_to_resume(interrupted, uninterrupted, site):
    (interrupted / "checkpoint-4" / "saes" / site / TRAINING_FILE).unlink()
    assert not same_weights(resumed(interrupted), uninterrupted)


@pytest.mark.parametrize("state", ["model.safetensors", "saes", "optimizer.pt", "scheduler.pt"])
def test_the_saved_state_is_what_resumes(interrupted, uninterrupted, tmp_path_factory, state):
    """Each state of another step in its place leads elsewhere."""
    other = tmp_path_factory.mktemp("other")
    resumable(other, max_steps=1, save_steps=1).train()
    saved = interrupted / "checkpoint-4" / state
    if saved.is_dir():
        shutil.copytree(other / "checkpoint-1" / state, saved, dirs_exist_ok=True)
    else:
        shutil.copy(other / "checkpoint-1" / state, saved)
    assert not same_weights(resumed(interrupted), uninterrupted)


def test_without_the_trainers_state_nothing_resumes(interrupted):
    (interrupted / "checkpoint-4" / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        resumed(interrupted)


def test_missing_heads_are_never_replaced_by_fresh_ones(interrupted):
    shutil.rmtree(interrupted / "checkpoint-4" / "saes")
    with pytest.raises(HeadFolderError, match="no head on"):
        resumed(interrupted)


def test_missing_weights_are_never_replaced_by_random_ones(interrupted):
    lose_a_weight(interrupted / "checkpoint-4", "transformer.h.1.mlp.c_fc.weight")
    with pytest.raises(CheckpointError, match=r"lacks weights, transformer\.h\.1\.mlp\.c_fc"):
        resumed(interrupted)


def test_resuming_from_the_last_step_trains_no_further(uninterrupted):
    folder = Path(uninterrupted.args.output_dir)
    ours = resumed(folder, step=8)
    assert ours.state.global_step == 8
    assert same_weights(ours, uninterrupted)


@pytest.mark.parametrize("state", [None, "", '{"global_step": 6, "log_his'])
def test_a_checkpoint_that_was_not_finished_is_skipped(interrupted, state):
    unfinished = interrupted / "checkpoint-6"
    shutil.copytree(interrupted / "checkpoint-4", unfinished)
    (unfinished / STATE_FILE).unlink()
    if state is not None:
        (unfinished / STATE_FILE).write_text(state)
    assert last_complete_checkpoint(interrupted).name == "checkpoint-4"


def test_the_newest_checkpoint_is_by_number(tmp_path):
    assert last_complete_checkpoint(tmp_path / "absent") is None
    for name in ("checkpoint-90", "checkpoint-100", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_FILE).write_text("{}")
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-100"


def test_training_time_adds_up_over_sessions(interrupted):
    session = interrupted / "checkpoint-4" / SESSION_FILE
    assert 0 < json.loads(session.read_text())["train_seconds"] < 100
    session.write_text(json.dumps({"train_seconds": 1000.0, "wall_seconds": 2000.0}))
    ours = resumed(interrupted)
    assert 1000 < ours.train_seconds < 1100
    final = json.loads((interrupted / "checkpoint-8" / SESSION_FILE).read_text())
    assert 1000 < final["train_seconds"] <= ours.train_seconds
    assert 2000 < final["wall_seconds"] < 2100


def test_the_clock_stands_still_in_evaluations(tmp_path):
    class Slow(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            assert ours._clock_started is not None

        def on_prediction_step(self, args, state, control, **kwargs):
            seen.append(ours.train_seconds)

    seen = []
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    ours = trainer(tiny_model(heads()), args, eval_dataset=rows(), callbacks=[Slow()])
    ours.train()
    first, second = seen[:6], seen[6:]
    assert len(set(first)) == len(set(second)) == 1 and first[0] < second[0] < ours.train_seconds


@pytest.mark.parametrize("answer, resumes", [(None, False), ("false", False), ("True", True)])
def test_resume_is_a_yes_or_no(tmp_path, answer, resumes):
    assert arguments(tmp_path, resume_from_checkpoint=answer).resumes is resumes


def test_resuming_from_a_named_checkpoint_is_refused(tmp_path):
    args = arguments(tmp_path, resume_from_checkpoint="runs/x/checkpoint-4")
    with pytest.raises(UserError, match="say true or false"):
        _ = args.resumes


# ---- checkpoints ----


class Spoil(TrainerCallback):
    """Changes parameters after a step, so that later evaluations are worse."""

    def __init__(self, step, choose, value=None):
        self.step, self.choose, self.value = step, choose, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                for parameter in self.choose(model):
                    if self.value is None:
                        parameter.add_(torch.randn_like(parameter))
                    else:
                        parameter.fill_(self.value)


@pytest.mark.parametrize(
    "metric, spoiled",
    [("loss", lambda model: model.parameters()), ("objective", lambda m: m.heads.parameters())],
)
def test_the_best_checkpoint_brings_its_heads_back(tmp_path, metric, spoiled):
    args = arguments(
        tmp_path,
        max_steps=4,
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": metric},
    )
    assert args.greater_is_better is False
    model = tiny_model(heads(3.0))
    ours = trainer(model, args, eval_dataset=rows(), callbacks=[Spoil(3, spoiled)])
    ours.train()
    chosen = Path(ours.state.best_model_checkpoint).name
    assert chosen in ("checkpoint-1", "checkpoint-2")
    ours.save_model()
    final, best, last = (weights(tmp_path / name) for name in ("", chosen, "checkpoint-4"))
    assert final.keys() == best.keys() == last.keys()
    assert all(torch.equal(final[name], best[name]) for name in best)
    heads_of_last = [name for name in last if name.startswith("blocks.")]
    assert len(heads_of_last) == 4 * len(SITES)
    assert not any(torch.equal(last[name], best[name]) for name in heads_of_last)


def test_heads_without_a_form_on_disk_are_refused_before_training(tmp_path):
    model = tiny_model([SAEHeadConfig("topk", SITES[0], WIDTH, 32, k=4, rectified=False)])
    with pytest.raises(HeadConfigError, match="rectified is off"):
        trainer(model, arguments(tmp_path))
    with pytest.raises(HeadConfigError, match="rectified is off"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_pickle_lies_beside_the_weights(uninterrupted):
    uninterrupted.save_model()
    folder = Path(uninterrupted.args.output_dir)
    files = [path for path in folder.rglob("*") if path.is_file() and "runs" not in path.parts]
    resume_only = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in files:
        is_resume_file = path.parent.name.startswith("checkpoint-") and path.name in resume_only
        assert is_resume_file or path.suffix in (".safetensors", ".json", ".md"), path
    assert {"model.safetensors", "config.json"} <= {path.name for path in folder.iterdir()}


# ---- what would train something else in silence ----


def test_smoothed_labels_which_would_leave_the_term_out_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"label_smoothing_factor is 0\.1.*; leave it out"):
        arguments(tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("option", ["save_only_model", "bf16_full_eval", "fp16_full_eval"])
def test_options_that_would_spoil_what_is_saved_are_refused(tmp_path, option):
    with pytest.raises(UserError, match=f"{option} is true, .*; leave it out"):
        arguments(tmp_path, **{option: True})


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "launched_processes", lambda: 2)
    with pytest.raises(UserError, match="2 processes were launched, but this one is joined to 1"):
        arguments(tmp_path)


def test_one_process_with_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SAERegArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(UserError, match=r"One process sees 2 GPUs.*multi_gpu\.yaml"):
        arguments(tmp_path)


def test_a_gradient_that_is_not_finite_is_never_stepped_with(tmp_path):
    model = tiny_model(upkept_heads())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = trainer(model, arguments(tmp_path, max_steps=1, max_grad_norm=0.0))
    model.transformer.wte.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NonFiniteLossError, match="At step 1 the norm of the gradient is nan"):
        ours.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("sites_per_step, waits", [(None, False), (2, True)])
def test_ddp_looks_for_unused_heads_where_a_step_leaves_some_out(tmp_path, sites_per_step, waits):
    model = tiny_model(upkept_heads(), term=TermOptions(sites_per_step=sites_per_step))
    ours = trainer(model, arguments(tmp_path, gradient_checkpointing=True))
    assert ours.accelerator.ddp_handler.find_unused_parameters is waits


def test_fsdp_rounds_neither_what_leaves_the_model_nor_gradients(tmp_path, monkeypatch):
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    create = Trainer.create_accelerator_and_postprocess

    def with_plugin(self):
        create(self)
        self.accelerator.state.fsdp_plugin = plugin  # accelerate takes FSDP to GPUs only

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_plugin)
    ours = trainer(tiny_model(), arguments(tmp_path))
    del ours.accelerator.state.fsdp_plugin
    found = plugin.mixed_precision_policy
    assert (found.param_dtype, found.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert found.output_dtype is None


@pytest.mark.parametrize("sharded, kind", [(True, int), (False, torch.Tensor)])
def test_fsdp_is_given_a_count_that_it_cannot_round(tmp_path, sharded, kind):
    model = tiny_model().train()
    ours = trainer(model, arguments(tmp_path))
    ours.is_fsdp_enabled = sharded
    received, ce = [], model.loss_function

    def watched(*args, num_items_in_batch=None, **kwargs):
        received.append(num_items_in_batch)
        return ce(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    model.loss_function = watched
    batch = collate(rows())
    loss = ours.compute_loss(model, batch, num_items_in_batch=torch.tensor(4097.0))  # not in bf16
    assert [type(number) for number in received] == [kind] and received[0] == 4097
    expected = summed_ce(model(**batch).logits, batch["labels"]) / 4097
    torch.testing.assert_close(loss, expected, **EXACT)


def test_rows_that_are_no_batch_are_refused_where_it_would_be_dropped(tmp_path):
    options = {"per_device_train_batch_size": 4}
    trainer(tiny_model(), arguments(tmp_path, **options), rows()[:3]).train()
    args = arguments(tmp_path, dataloader_drop_last=True, **options)
    trainer(tiny_model(), args, rows()[:4]).train()
    sentence = "split has 3 rows, fewer than the 4 of one batch .* lower per_device_train_batch"
    with pytest.raises(UserError, match=sentence):
        trainer(tiny_model(), args, rows()[:3])


# ---- what is not finite ----


def non_finite(tmp_path, choose, value=math.nan, **options):
    spoil = Spoil(2, choose, value)
    args = arguments(tmp_path, max_steps=4, **options)
    return trainer(tiny_model(heads(3.0)), args, eval_dataset=rows(), callbacks=[spoil])


def one_head(model):
    return [model.heads[SITES[1]].b_dec]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_term_that_is_not_finite_is_named_by_step_and_site(tmp_path, value):
    with pytest.raises(NonFiniteLossError, match=rf"step 3 the term at {SITES[1]} is") as caught:
        non_finite(tmp_path, one_head, value).train()
    assert "cross-entropy" not in str(caught.value) and SITES[0] not in str(caught.value)
    assert isinstance(caught.value, UserError)
    # with changed options the folder cannot be continued
    assert "start anew in another output_dir" in str(caught.value)


def test_a_cross_entropy_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(NonFiniteLossError, match="step 3 the cross-entropy is nan"):
        non_finite(tmp_path, lambda model: [model.transformer.wte.weight]).train()


def test_an_evaluation_that_is_not_finite_stops_too(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(NonFiniteLossError, match=rf"step 2 the term at {SITES[1]} is nan"):
        non_finite(tmp_path, one_head, **options).train()


def test_b_dec_starts_in_the_middle_of_the_first_rows(tmp_path):
    model = tiny_model(heads())
    args = arguments(tmp_path, b_dec_init="mean", b_dec_init_rows=3, learning_rate=0.0)
    trainer(model, args).train()
    first = collate([rows()[i] for i in range(3)])
    with torch.no_grad(), model.reading(SITES) as activations:
        model(first["input_ids"], attention_mask=first.get("attention_mask"))
    real = first.get("attention_mask", torch.ones_like(first["input_ids"])).bool()
    for site in SITES:
        expected = activations[site][real].mean(dim=0)
        torch.testing.assert_close(model.heads[site].b_dec.data, expected)


def test_a_trained_b_dec_is_not_started_anew(tmp_path):
    model = tiny_model(heads())
    model.heads[SITES[1]].b_dec.data.fill_(1.0)
    with pytest.raises(UserError, match=f"b_dec_init is mean, .* {SITES[1]} has a trained b_dec"):
        trainer(model, arguments(tmp_path, b_dec_init="mean")).train()


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_figures_of_all_sites_stand_side_by_side(tmp_path, capsys, disable_tqdm):
    trainer(tiny_model(heads()), arguments(tmp_path, disable_tqdm=disable_tqdm)).train()
    printed = capsys.readouterr()
    (line,) = [part for part in printed.out.splitlines() if part.startswith("step 1 | loss ")]
    (figure,) = re.findall(r" l0 ([^|]*) \|", line)
    assert len(figure.split()) == len(heads())
    assert ("%|" in printed.err) == (not disable_tqdm)
