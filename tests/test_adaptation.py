"""The modes of adaptation: what each trains, what comes out, and what stock PEFT makes of it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_job import (
    D_SAE,
    SITES,
    WIDTH,
    Gradients,
    arguments,
    collate,
    rows,
    summed_ce,
    tiny_model,
    trainer,
)
from transformers import GPT2LMHeadModel

from hf_saereg.adaptation import ADAPTED, AdaptationArguments, AdaptationError, adapt
from hf_saereg.adapters import AdapterError
from hf_saereg.divergence import kl_of_predictions
from hf_saereg.errors import UserError
from hf_saereg.heads import HeadConfigError, SAEHeadConfig, make_head
from hf_saereg.heads.folder import HeadFolderError, load_head, save_heads
from hf_saereg.heads.start import start_heads
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.regularizer import TermOptions
from hf_saereg.resuming import last_complete_checkpoint
from hf_saereg.splicing import Splice

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def head_configs(sites=SITES, **options):
    return [
        SAEHeadConfig("topk", site, WIDTH, D_SAE, k=4, reconstruction_weight=0.5, **options)
        for site in sites
    ]


@pytest.fixture(scope="module")
def trained_heads(tmp_path_factory):
    """Folder of trained heads on all sites."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(3)
    heads = [make_head(config).double() for config in head_configs()]
    for head in heads:
        torch.nn.init.normal_(head.b_enc, std=0.1)
        torch.nn.init.normal_(head.W_enc, std=0.3)
    save_heads(heads, folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a plain model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return folder


def adapted(
    base, mode, sites=SITES, term=None, dtype=torch.float64, normalization="published", **options
):
    model = SAERegGPT2LMHeadModel.from_pretrained(base, dtype=dtype)
    torch.manual_seed(5)
    configs = head_configs(sites, normalization=normalization)
    lora = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0} if mode in ADAPTED else {}
    options = lora | options
    adapt(model, AdaptationArguments(mode=mode, **options), configs, term)
    return model.to(dtype)


def train(model, folder, steps=2, **options):
    options = {"max_steps": steps, "learning_rate": 0.05} | options
    ours = trainer(model, arguments(folder, **options), eval_dataset=rows([12] * 4, seed=2))
    ours.train()
    return ours


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    """What training changed: heads, adapters, and the language model's own weights."""
    names = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    parts = {"heads": "heads.", "adapters": "lora_"}
    found = {part for part, mark in parts.items() if any(mark in name for name in names)}
    own = {n for n in names if not n.startswith("heads.") and "lora_" not in n}
    return found | ({"model"} if own else set())


@pytest.mark.parametrize(
    "mode, trained",
    [
        ("joint", {"model", "heads"}),
        ("lora", {"adapters", "heads"}),
        ("lora_frozen_heads", {"adapters"}),
        ("heads", {"heads"}),
    ],
)
def test_a_mode_trains_what_it_says(base, trained_heads, tmp_path, mode, trained):
    model = adapted(base, mode, heads_from=str(trained_heads))
    before = state(model)
    train(model, tmp_path)
    assert changed(before, model) == trained


def test_the_term_reaches_the_adapters(base, tmp_path):
    """Features and weights inform each other: without CE, adapters still learn from the term."""
    model = adapted(base, "lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model(**collate(rows())).term.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any(g.abs().max() > 0 for n, g in gradients.items() if "lora_A" in n)
    assert all("lora_" in name or name.startswith("heads.") for name in gradients)


# ---- frozen heads, spliced in ----


@pytest.mark.parametrize("splice_loss", ["ce", "kl"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_heads_are_in_the_forward_pass_that_adapters_learn_from(
    base, trained_heads, tmp_path, splice_loss, micro_batches, checkpointing
):
    """CE, or KL to the original, of the model with reconstructions at two sites."""
    options = {"heads_from": str(trained_heads), "sites": SITES[1:]}
    term = TermOptions(splice_loss=splice_loss)
    kept = Gradients()
    args = arguments(
        tmp_path,
        per_device_train_batch_size=12 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        gradient_checkpointing=checkpointing,
    )
    model = adapted(base, "lora_frozen_heads", term=term, **options)
    perturb(model)
    trainer(model, args, callbacks=[kept]).train()

    model = adapted(base, "lora_frozen_heads", term=term, **options)
    perturb(model)
    model.train()
    batch = collate(rows())
    mask = batch["attention_mask"].bool()
    splices = {
        site: lambda x, site=site: torch.where(mask[..., None], model.heads[site](x), x)
        for site in SITES[1:]
    }
    plain = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64).eval()
    original = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with model.at_sites(splices):
        logits = model(**batch, compute_term=False).logits
    predicted = batch["labels"][:, 1:] != -100
    p, q = (x[:, :-1][predicted].log_softmax(-1) for x in (original.detach(), logits))
    kl = (p.exp() * (p - q)).sum() / predicted.sum()
    ce = summed_ce(logits, batch["labels"]) / predicted.sum()
    (ce if splice_loss == "ce" else kl).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected and kept.by_name.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(kept.by_name[name], gradient, **CLOSE, msg=name)


def perturb(model):
    """Adapters as after some training."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_frozen_heads_stay_in_evaluation_mode_and_log_what_they_do(base, trained_heads, tmp_path):
    model = adapted(base, "lora_frozen_heads", sites=SITES[1:2], heads_from=str(trained_heads))
    ours = train(model, tmp_path, eval_strategy="steps", eval_steps=2, eval_fidelity=True)
    model.train()
    assert not any(head.training for head in model.heads) and model.transformer.h[0].training
    first, second, evaluation, _ = ours.state.log_history
    for log in (first, second):
        assert log[f"l0/{SITES[1]}"] == 4 and "term" not in log
        assert log["loss"] == pytest.approx(log["ce"], rel=1e-3)
    assert first[f"fvu/{SITES[1]}"] != second[f"fvu/{SITES[1]}"]  # every window starts anew
    assert evaluation["eval_compound_ce_increase"] != 0
    assert not model.heads[SITES[1]].tokens_since_fired.any()


@pytest.mark.parametrize("splice_loss", ["ce", "kl"])
def test_evaluation_measures_what_adapters_around_frozen_heads_learn(
    base, trained_heads, tmp_path, splice_loss
):
    options = {"heads_from": str(trained_heads), "sites": SITES[1:]}
    term = TermOptions(splice_loss=splice_loss)
    model = adapted(base, "lora_frozen_heads", term=term, **options)
    perturb(model)
    args = arguments(tmp_path, per_device_eval_batch_size=5)
    figures = trainer(model, args, eval_dataset=rows()).evaluate()
    batch = collate(rows())
    plain = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64).eval()
    with torch.no_grad():
        known = {name: batch[name] for name in ("input_ids", "attention_mask")}
        original = plain(**known).logits
        mask = model.token_mask(batch)
        with model.at_sites({site: Splice(model.heads[site], mask) for site in SITES[1:]}):
            logits = model(**batch, compute_term=False).logits
        whole = model(**batch, compute_term=False).logits
    number = (batch["labels"][:, 1:] != -100).sum()
    ce, kl = (
        summed_ce(logits, batch["labels"]) / number,
        kl_of_predictions(original, logits, batch["labels"]),
    )
    expected = (ce if splice_loss == "ce" else kl).item()
    assert figures["eval_spliced_loss"] == pytest.approx(expected, rel=1e-6)
    assert figures["eval_objective"] == figures["eval_spliced_loss"]
    plain_ce = summed_ce(whole, batch["labels"]) / number
    assert figures["eval_loss"] == pytest.approx(plain_ce.item(), rel=1e-6)
    assert abs(figures["eval_loss"] - expected) > 1e-3


@pytest.mark.parametrize(
    "option", [{"heads_learning_rate": 0.1}, {"b_dec_init": "mean"}, {"resample_every": 2}]
)
def test_options_of_heads_that_train_are_refused_where_they_are_frozen(
    base, trained_heads, tmp_path, option
):
    model = adapted(base, "lora_frozen_heads", sites=SITES[1:2], heads_from=str(trained_heads))
    with pytest.raises(UserError, match=f"{next(iter(option))} is .* heads are frozen; leave it"):
        trainer(model, arguments(tmp_path, **option))


# ---- anchor ----


class AtLastStep(Gradients):
    """Keeps the weights, too."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["joint", "lora"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_anchor_is_kl_from_the_model_at_the_start(base, tmp_path, mode, micro_batches):
    kept, model = AtLastStep(), adapted(base, mode, normalization="layer_norm")
    args = arguments(
        tmp_path,
        max_steps=2,  # at the first the model is its own base
        anchor_weight=3.0,
        per_device_train_batch_size=12 // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    trainer(model, args, callbacks=[kept]).train()

    model = adapted(base, mode, normalization="layer_norm")
    model.load_state_dict(kept.state)
    model.train()
    batch = collate(rows())
    output = model(**batch)
    plain = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64).eval()
    original = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    predicted = batch["labels"][:, 1:] != -100
    p, q = (x[:, :-1][predicted].log_softmax(-1) for x in (original.detach(), output.logits))
    kl = (p.exp() * (p - q)).sum() / predicted.sum()
    assert kl > 1e-5
    ce = summed_ce(output.logits, batch["labels"]) / predicted.sum()
    (ce + output.term + 3 * kl).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(kept.by_name[name], parameter.grad, **CLOSE, msg=name)


@pytest.mark.parametrize("mode", ["joint", "lora"])
def test_evaluation_measures_the_base_and_the_distance_to_it(base, tmp_path, mode):
    model = adapted(base, mode)
    ours = train(model, tmp_path, steps=3, learning_rate=1.0, eval_base=True)
    found = ours.evaluate()
    batch = collate(rows([12] * 4, seed=2))
    plain = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64).eval()
    original, now = plain(**batch).logits, model(**batch).logits
    p, q = (x[:, :-1].log_softmax(-1) for x in (original, now))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl > 1e-5
    assert found["eval_kl_to_base"] == pytest.approx(kl, rel=1e-5)
    number = batch["labels"][:, 1:].numel()
    base_ce = summed_ce(original, batch["labels"]).item() / number
    assert found["eval_base_loss"] == pytest.approx(base_ce, rel=1e-6)
    assert found["eval_loss"] == pytest.approx(
        summed_ce(now, batch["labels"]).item() / number, rel=1e-6
    )
    summary = ours.summary()
    assert summary["kl_to_base"] == found["eval_kl_to_base"]
    assert summary["base_ce"] == found["eval_base_loss"]


def test_kl_does_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch):
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 9, 7, dtype=torch.float64).unbind()
    other.requires_grad_()
    labels = torch.randint(7, (3, 9)).masked_fill(torch.rand(3, 9) < 0.3, -100)
    results = []
    for at_once in (1024, 4):
        monkeypatch.setattr("hf_saereg.divergence.ROWS_AT_ONCE", at_once)
        kl = kl_of_predictions(one, other, labels)
        results.append((kl, *torch.autograd.grad(kl, other)))
    torch.testing.assert_close(*results)
    assert results[0][0] > 0


def test_the_base_stays_as_it_was_while_the_model_trains(base, tmp_path):
    for mode in ("joint", "lora"):
        ours = train(adapted(base, mode), tmp_path / mode, eval_base=True)
        batch = collate(rows())
        plain = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64).eval()
        expected = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ours.model.train()
        torch.testing.assert_close(ours.reference.logits(batch), expected)
        assert ours.model.training
        trained = [p.requires_grad for n, p in ours.model.named_parameters() if "lora" in n]
        assert all(trained)


# ---- adapters on disk ----

WITHOUT_US = """
import sys

sys.modules["hf_saereg"] = None  # importing it fails from here on
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

base, adapter, expected = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
tensors = load_file(expected)
torch.testing.assert_close(model(tensors["input_ids"]).logits, tensors["logits"])
merged = model.merge_and_unload()
torch.testing.assert_close(merged(tensors["input_ids"]).logits, tensors["logits"])
"""


@pytest.mark.filterwarnings("ignore")
def test_stock_peft_reproduces_the_logits_without_us(base, tmp_path):
    model = adapted(base, "lora", dtype=torch.float32)
    train(model, tmp_path / "run").save_model(str(tmp_path / "adapter"))
    input_ids = collate(rows())["input_ids"]
    logits = model.eval()(input_ids).logits.detach()
    plain = GPT2LMHeadModel.from_pretrained(base)(input_ids).logits
    assert (logits - plain).abs().max() > 1e-3
    save_file({"input_ids": input_ids, "logits": logits}, tmp_path / "expected.safetensors")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "saes", "README.md"}
    assert not {"model.safetensors", "config.json"} & files
    words = [base, tmp_path / "adapter", tmp_path / "expected.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *words],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_adapter_comes_back_with_its_heads(base, tmp_path):
    model = adapted(base, "lora", sites=SITES[1:], dtype=torch.float32)
    train(model, tmp_path / "run").save_model(str(tmp_path / "adapter"))
    again = SAERegGPT2LMHeadModel.from_pretrained(tmp_path / "adapter")
    assert again.has_adapters and again.heads.hook_names == SITES[1:]
    torch.testing.assert_close(state(again.eval()), state(model.eval()), rtol=0, atol=0)
    input_ids = collate(rows())["input_ids"]
    assert torch.equal(again(input_ids).logits, model(input_ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_merged_it_is_a_plain_regularized_gpt2(base, tmp_path):
    model = adapted(base, "lora", dtype=torch.float32)
    train(model, tmp_path / "run")
    input_ids = collate(rows())["input_ids"]
    expected = model.eval()(input_ids).logits.detach()
    heads = {n: t for n, t in state(model).items() if n.startswith("heads.")}
    model.merge_and_unload()
    assert not model.has_adapters and all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(input_ids).logits, expected, **CLOSE)
    model.save_pretrained(tmp_path / "merged")
    keys = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert keys == load_file(base / "model.safetensors").keys()
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(stock(input_ids).logits, expected, **CLOSE)
    again = SAERegGPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert {n: t for n, t in state(again).items() if n.startswith("heads.")}.keys() == heads.keys()
    for name, tensor in heads.items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_merges_what_it_saved_and_keeps_its_model(base, tmp_path):
    model = adapted(base, "lora", dtype=torch.float32)
    model.config.resid_pdrop = 0.05  # not the base's
    ours = train(model, tmp_path / "run")
    ours.save_model()
    before = state(model)
    ours.save_merged(tmp_path / "merged")
    assert model.has_adapters and model.config.name_or_path == str(base)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    model.merge_and_unload()
    in_place = tmp_path / "in_place" / "merged"  # a card has the folder's name
    ours._save(str(in_place))
    files = {path.relative_to(in_place) for path in in_place.rglob("*") if path.is_file()}
    assert {str(file) for file in files} >= {"model.safetensors", "training.json", "README.md"}
    for file in files:
        ours, expected = tmp_path / "merged" / file, in_place / file
        if file.suffix == ".safetensors":
            torch.testing.assert_close(load_file(ours), load_file(expected), rtol=0, atol=0)
        else:
            assert ours.read_text() == expected.read_text(), file


def test_a_merge_that_is_not_finite_is_refused_and_undone(base):
    model = adapted(base, "lora", dtype=torch.float32)
    *_, last = (p for n, p in model.named_parameters() if "lora_B" in n)
    perturb(model)
    before = state(model)
    last.data.fill_(float("inf"))
    with pytest.raises(AdapterError, match="cannot be merged"):
        model.merge_and_unload()
    last.data.copy_(before[next(n for n, p in model.named_parameters() if p is last)])
    torch.testing.assert_close(state(model), before)
    model.merge_and_unload()
    with pytest.raises(AdapterError, match="no adapter to merge"):
        model.merge_and_unload()


@pytest.mark.parametrize("mode", ["lora", "lora_frozen_heads", "heads"])
def test_a_resumed_run_ends_with_the_same_weights(base, trained_heads, tmp_path, mode):
    def job(folder):
        options = {
            "optim": "adamw_torch",
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": 4,
        }
        options |= {"lr_scheduler_type": "cosine", "learning_rate": 0.01, "anchor_weight": 0.0}
        options |= {} if mode == "lora_frozen_heads" else {"heads_learning_rate": 0.03}
        lora = {"lora_dropout": 0.2} if mode in ADAPTED else {}
        model = adapted(base, mode, heads_from=str(trained_heads), **lora)
        return trainer(model.float(), arguments(tmp_path / folder, **options))

    whole = job("whole")
    whole.train()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    resumed = job("resumed")
    perturb(resumed.model)  # whatever it starts from is replaced
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path))
    assert resumed.state.global_step == 4
    torch.testing.assert_close(state(resumed.model), state(whole.model), rtol=0, atol=0)


# ---- heads that start from others ----


def test_heads_start_from_a_run_and_are_trained_on_as_the_options_say(base, trained_heads):
    options = {"heads_from": str(trained_heads), "sites": SITES[1:]}
    model = adapted(base, "joint", **options)
    saved = SAERegGPT2LMHeadModel.from_pretrained(base)
    saved.load_heads(trained_heads)
    assert model.heads.hook_names == SITES[1:]
    for head in model.heads:
        other = saved.heads[head.config.hook_name]
        assert torch.equal(head.W_enc, other.W_enc) and torch.equal(head.b_enc, other.b_enc)
        assert head.config.reconstruction_weight == 0.5
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("several", [False, True])
def test_heads_start_from_what_saelens_wrote(base, trained_heads, tmp_path, several):
    """Its folders have no part of ours in the metadata."""
    for site in SITES[:2] if several else SITES[:1]:
        source = trained_heads / "saes" / site
        folder = tmp_path / f"an_sae_{site[7]}" if several else tmp_path
        folder.mkdir(exist_ok=True)
        (folder / "sae_weights.safetensors").write_bytes(
            (source / "sae_weights.safetensors").read_bytes()
        )
        cfg = json.loads((source / "cfg.json").read_text())
        del cfg["metadata"]["saereg"]
        (folder / "cfg.json").write_text(json.dumps(cfg))
    sites = SITES[:2] if several else SITES[:1]
    model = adapted(base, "lora_frozen_heads", sites=sites, heads_from=str(tmp_path))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for site in sites:
        theirs = load_head(trained_heads, site)
        torch.testing.assert_close(model.heads[site](x), theirs(x))
    with pytest.raises(HeadFolderError, match=r"has no head on blocks.1.hook_resid_\w+, but on"):
        adapted(base, "joint", heads_from=str(tmp_path))


def as_saelens_wrote_it(head, folder, hook_name):
    """Its folder, without our part of the metadata."""
    save_heads([head], folder)
    written = folder / "saes" / head.config.hook_name
    cfg = json.loads((written / "cfg.json").read_text())
    del cfg["metadata"]["saereg"]
    cfg["metadata"]["hook_name"] = hook_name
    (written / "cfg.json").write_text(json.dumps(cfg))
    return written


def test_a_head_after_a_block_starts_one_before_the_next(base, trained_heads, tmp_path):
    """The same stream; after the last block it is a site of its own."""
    after = "blocks.0.hook_resid_post"
    theirs = load_head(trained_heads, SITES[1])
    folder = as_saelens_wrote_it(theirs, tmp_path, hook_name=after)
    model = adapted(base, "lora_frozen_heads", sites=SITES[1:2], heads_from=str(folder))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model.heads[SITES[1]](x), theirs(x))
    for site in (SITES[0], SITES[2]):
        with pytest.raises(HeadFolderError, match=f"no head on {site}, but on {after}"):
            adapted(base, "joint", sites=[site], heads_from=str(folder))


@pytest.mark.parametrize("family", ["standard", "tied", "gated", "jumprelu", "batchtopk"])
def test_heads_go_on_dividing_by_the_spread(family, tmp_path):
    """In training the spread is that of the batch, in evaluation the one that was followed."""
    options = {"k": 4} if family == "batchtopk" else {}
    family, tied = ("standard", True) if family == "tied" else (family, False)
    config = SAEHeadConfig(
        family, SITES[0], WIDTH, 24, tied=tied, normalization="variance", **options
    )
    torch.manual_seed(0)
    trained = make_head(config).double()
    x = 30 * torch.randn(50, WIDTH, dtype=torch.float64)
    for parameter in trained.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trained.train().losses(x)
    save_heads([trained], tmp_path)
    (started,) = start_heads(tmp_path, [config])
    assert started.scale > 20
    for mode in (False, True):
        trained.train(mode), started.train(mode)
        features = trained.encode(x)
        assert 0 < (features > 0).double().mean() < 1
        torch.testing.assert_close(started.encode(x), features, rtol=0, atol=0)
        torch.testing.assert_close(started(x), trained(x), rtol=0, atol=0)


def test_heads_of_raw_activations_have_no_spread_to_divide_by(base, trained_heads):
    with pytest.raises(HeadConfigError, match=r"does not know the spread.*normalization: publish"):
        adapted(base, "joint", normalization="variance", heads_from=str(trained_heads))


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"mode": "qlora"}, "mode is 'qlora'; choose one of joint, lora"),
        ({"mode": "lora_frozen_heads"}, "name them by heads_from"),
        ({"lora_r": 0}, "lora_r is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_targets": ["wte"]}, "tied to the output layer"),
        ({"lora_r": 16}, "lora_r is 16, but mode joint has no adapters; leave it out, or say mode"),
        (
            {"mode": "heads", "lora_targets": ["c_fc"]},
            r"lora_targets is .*, but mode heads",
        ),
        ({"mode": "plain", "lora_dropout": 0.0}, "lora_dropout is 0.0, but mode plain has no"),
    ],
)
def test_options_that_cannot_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        AdaptationArguments(**options)


@pytest.mark.parametrize(
    "own, sentence",
    [
        ({"d_sae": 8}, "has d_sae 24, the options say 8; say d_sae: 24"),
        ({"k": 3}, "has k 4, the options say 3"),
        ({"normalization": "layer_norm"}, "it must be layer_norm for both"),
    ],
)
def test_heads_that_were_trained_as_others_are_refused(base, trained_heads, own, sentence):
    model = SAERegGPT2LMHeadModel.from_pretrained(base)
    config = SAEHeadConfig(**vars(head_configs()[0]) | own)
    arguments = AdaptationArguments(heads_from=str(trained_heads))
    with pytest.raises(HeadConfigError, match=sentence):
        adapt(model, arguments, [config])


def test_modes_and_options_that_exclude_each_other(base, trained_heads, tmp_path):
    frozen = {"mode": "lora_frozen_heads", "heads_from": str(trained_heads)}
    for option in ({"splice_weight": 1.0}, {"token_fraction": 0.5}, {"splice_sites": 1}):
        with pytest.raises(AdaptationError, match=f"{next(iter(option))} .* leave it out"):
            adapted(base, term=TermOptions(**option), **frozen)
    model = SAERegGPT2LMHeadModel.from_pretrained(base, resid_pdrop=0.1)
    with pytest.raises(AdaptationError, match="load it with dropout 0"):
        adapt(model, AdaptationArguments(mode="heads"), head_configs())
    with pytest.raises(UserError, match="say splice_loss kl to stay close"):
        train(adapted(base, **frozen), tmp_path, anchor_weight=1.0)
    with pytest.raises(UserError, match="the language model, which is frozen"):
        train(adapted(base, "heads"), tmp_path, anchor_weight=1.0)


def test_the_heads_have_a_learning_rate_of_their_own(base, tmp_path):
    model = adapted(base, "joint")
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "heads_learning_rate": 0.03}
    ours = train(model, tmp_path, learning_rate=0.01, **options)
    groups = ours.optimizer.param_groups
    heads = set(model.heads.parameters())
    assert [group["initial_lr"] for group in groups] == [0.01, 0.01, 0.03]
    assert set(groups[2]["params"]) == heads and groups[2]["weight_decay"] == 0
    others = {p for group in groups[:2] for p in group["params"]}
    assert others == set(model.parameters()) - heads
