"""One mask: what is skipped changes no loss, gradient or figure of a head, wherever it is read."""

import dataclasses
import json
import math

import pytest
import torch
from datasets import Dataset
from training_job import Gradients, arguments, collate, heads, rows, tiny_model, trainer

from hf_saereg.adaptation import AdaptationArguments, adapt
from hf_saereg.configuration import HeadsArguments
from hf_saereg.corpora import character_tokenizer
from hf_saereg.errors import UserError
from hf_saereg.features import Reader, describe, survey
from hf_saereg.fidelity import FidelityError, baselines, fidelity
from hf_saereg.grid import Cell, Schedule
from hf_saereg.head_quality import measure_model, own_set
from hf_saereg.heads import HeadConfigError, SAEHeadConfig, SkipOptions
from hf_saereg.heads.start import start_heads
from hf_saereg.heads.tokens import token_mask
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.regularizer import TermOptions, regularization
from hf_saereg.sweep import SharedTraining

POST = "blocks.1.hook_resid_post"  # what is changed here reaches no other token
END = 99
SKIPS = [
    {"skip_positions": 1},
    {"skip_positions": 2},
    {"skip_tokens": [END]},
    {"skip_positions": 2, "skip_tokens": [END]},
]
HUGE = 1e6


def padded(ids, side):
    """Rows of 10, 6 and 3 tokens, each with an `END` in its middle."""
    mask = torch.zeros(3, 12, dtype=torch.long)
    out = torch.zeros(3, 12, dtype=torch.long)
    for i, length in enumerate((10, 6, 3)):
        row = ids[i, :length].masked_fill(ids[i, :length] == END, 1)
        row[length // 2] = END
        place = slice(0, length) if side == "right" else slice(12 - length, 12)
        out[i, place], mask[i, place] = row, 1
    return {
        "input_ids": out,
        "attention_mask": mask,
        "labels": out.masked_fill(mask == 0, -100),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def mask_by_hand(batch, skip):
    """Token by token, as the options say it."""
    read = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    for i, (ids, real) in enumerate(
        zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    ):
        seen = 0
        for j, token in enumerate(ids):
            if real[j]:
                seen += 1
                read[i, j] = seen > skip.skip_positions and token not in skip.skip_tokens
    return read


def with_skip(configs, **options):
    return [dataclasses.replace(config, **options) for config in configs]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", SKIPS)
def test_positions_are_counted_over_real_tokens(input_ids, side, options):
    batch, skip = padded(input_ids, side), SkipOptions(**options)
    found = token_mask(skip, batch["input_ids"], batch["attention_mask"])
    assert torch.equal(found, mask_by_hand(batch, skip))
    assert 0 < found.sum() < batch["attention_mask"].sum()
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert torch.equal(token_mask(skip, batch["input_ids"]), mask_by_hand(whole, skip))


def test_after_cached_keys_only_the_given_tokens_are_in_the_mask(input_ids):
    batch, skip = padded(input_ids, "left"), SkipOptions(skip_positions=2, skip_tokens=[END])
    rest = token_mask(skip, batch["input_ids"][:, 8:], batch["attention_mask"])
    assert torch.equal(rest, mask_by_hand(batch, skip)[:, 8:])


def test_by_default_the_mask_is_that_of_padding(input_ids):
    batch = padded(input_ids, "left")
    found = token_mask(SkipOptions(), batch["input_ids"], batch["attention_mask"])
    assert torch.equal(found, batch["attention_mask"].bool())
    assert token_mask(SkipOptions(), input_ids) is None
    assert token_mask(SkipOptions(), input_ids, torch.ones_like(input_ids)) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_by_default_the_term_is_to_the_last_bit_that_of_the_real_tokens(model, input_ids, side):
    batch = padded(input_ids, side)
    with torch.no_grad(), model.reading(model.hook_names) as activations:
        found = model(**batch).term
    expected = regularization(model.heads, activations, batch["attention_mask"]).term
    assert torch.equal(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", SKIPS)
@pytest.mark.parametrize("splice_weight", [0.0, 0.5])
def test_what_is_skipped_changes_neither_losses_nor_gradients_of_heads(
    plain_model, head_configs, input_ids, side, options, splice_weight
):
    model, batch = plain_model, padded(input_ids, side)
    term = TermOptions(splice_weight=splice_weight, splice_sites=1, token_fraction=0.7)
    model.attach_heads(with_skip([head_configs[2]], **options), term)
    model.train()
    read = mask_by_hand(batch, model.skip)
    batch["labels"][:, 1:][~read[:, :-1]] = -100  # CE would see what is done to the others

    def step():
        model.zero_grad()
        output = model(**batch)
        (output.term + splice_weight * (output.spliced_loss or 0)).backward()
        return output, [parameter.grad.clone() for parameter in model.heads.parameters()]

    expected, gradients = step()
    with model.at_sites({POST: lambda x: torch.where(read[..., None], x, HUGE + x)}):
        found, own = step()
    assert torch.equal(found.term, expected.term)
    assert found.sites[POST].losses.statistics.tokens == math.ceil(0.7 * int(read.sum()))
    assert all(
        map(
            torch.equal, found.sites[POST].losses.statistics, expected.sites[POST].losses.statistics
        )
    )
    for a, b in zip(own, gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert b.any()
    if splice_weight:
        torch.testing.assert_close(found.spliced_loss, expected.spliced_loss)


@pytest.mark.parametrize("options", SKIPS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_skipped_changes_no_figure_of_fidelity(model, input_ids, options, side):
    batch = padded(input_ids, side)
    del batch["position_ids"]
    model.skip_over(SkipOptions(**options))
    read = mask_by_hand(batch, model.skip)
    batch["labels"][:, 1:][~read[:, :-1]] = -100

    def measured():
        base = baselines(model, [batch])
        return base, fidelity(model, model.heads, [batch], base)

    base, expected = measured()
    with model.at_sites({POST: lambda x: torch.where(read[..., None], x, HUGE + x)}):
        soiled_base, found = measured()
    assert soiled_base.spectrum == base.spectrum
    for ours, theirs in zip(soiled_base[:-1], base[:-1], strict=True):
        assert ours == pytest.approx(theirs)
    assert found.figures() == pytest.approx(expected.figures())
    statistics = found.sites[POST].statistics
    assert all(map(torch.equal, statistics, expected.sites[POST].statistics))
    assert statistics.tokens == read.sum()


def test_a_skipped_token_keeps_its_own_activations_and_ce_covers_it(model, input_ids):
    batch = {"input_ids": input_ids, "labels": input_ids}
    everything = SkipOptions(skip_positions=len(input_ids[0]) - 1)
    whole = baselines(model, [batch])
    model.skip_over(everything)
    base = baselines(model, [batch])
    assert base.clean_ce == whole.clean_ce
    # the only token that is read predicts nothing
    assert base.mean_ablated_ce_all == base.clean_ce
    assert fidelity(model, model.heads, [batch], base).compound.ce_increase == 0


@pytest.mark.parametrize("options", SKIPS)
def test_fresh_heads_train_on_what_is_read_alone(plain_model, options):
    model = plain_model
    model.skip_over(SkipOptions(**options))
    ids = torch.randint(128, (8, 12), generator=torch.Generator().manual_seed(3))
    ids[::2, 5] = END
    blocks = Dataset.from_dict({"input_ids": ids})

    def trained():
        shared = SharedTraining.of(model, blocks, Schedule(4, 4, 1e-2, 0.5, 1), 0)
        training = shared.start(Cell("standard", 0.2, "sparsity_coefficient", (32,), 0))
        shared.run([training], "test", show_progress=False)
        return shared, shared.finished(training).whole[POST]

    def soil(x):
        mask = token_mask(model.skip, soil.ids)
        return torch.where(mask[..., None], x, HUGE + x)

    shared, expected = trained()
    given = model.transformer.register_forward_pre_hook(
        lambda _module, args: setattr(soil, "ids", args[0])
    )
    with model.at_sites({POST: soil}):
        soiled_shared, found = trained()
    given.remove()
    assert soiled_shared.scales[POST] == shared.scales[POST]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert expected.config.skip == model.skip


def test_blocks_that_are_skipped_whole_are_refused(plain_model):
    plain_model.skip_over(SkipOptions(skip_positions=4))
    blocks = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 4})
    with pytest.raises(HeadConfigError, match=r"skip_positions 4 .* leave no token"):
        SharedTraining.of(plain_model, blocks, Schedule(4, 4, 1e-2, 0.5, 1), 0)


@pytest.mark.parametrize("options", SKIPS)
def test_what_is_skipped_fires_no_feature_and_counts_in_no_measure(model, input_ids, options):
    ids = input_ids.clone()
    ids[:, 4] = END
    batches = [{"input_ids": ids, "labels": ids}]
    model.skip_over(SkipOptions(**options))
    read = token_mask(model.skip, ids)
    reader = Reader("model", model, model.heads[POST], character_tokenizer(32))

    def measured():
        (found,), _ = survey([reader], batches, 2)
        shown = describe(reader, found, batches, range(24), 3)
        own = own_set(model)
        quality = measure_model(model, reader.tokenizer, own, batches, 2, "model")["heads"]
        return found, shown, [row for row in quality if row["site"] == POST]

    expected, shown, quality = measured()
    with model.at_sites({POST: lambda x: torch.where(read[..., None], x, HUGE + x)}):
        found, soiled_shown, soiled_quality = measured()
    assert found.tokens == read.sum()
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert soiled_shown == shown
    assert soiled_quality == quality
    assert quality[0]["l0"] == pytest.approx(expected.fired.sum().item() / expected.tokens)


def test_accumulated_batches_weigh_the_tokens_that_are_read(tmp_path):
    """Means over tokens alone, so that one large batch has the same gradients."""

    def gradients(micro_batches):
        kept = Gradients()
        args = arguments(
            tmp_path / str(micro_batches),
            per_device_train_batch_size=12 // micro_batches,
            gradient_accumulation_steps=micro_batches,
        )
        configs = with_skip(heads(0.0), skip_positions=2, skip_tokens=[3, 7])
        trainer(tiny_model(configs), args, rows(), callbacks=[kept]).train()
        return kept.by_name

    expected = gradients(1)
    for name, gradient in gradients(6).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11, msg=name)


def test_upkeep_and_norms_are_of_what_is_read(tmp_path):
    args = arguments(tmp_path, b_dec_init="mean", learning_rate=0.0)
    ours = trainer(tiny_model(with_skip(heads(), skip_positions=1)), args)
    found = ours._upkeep._activations(collate(rows()))
    plain = tiny_model()
    plain.skip_over(SkipOptions(skip_positions=1))
    twin = trainer(plain, arguments(tmp_path, learning_rate=0.0))
    twin.train()
    norms = {}
    for name, batch in (("upkeep", collate(rows())), ("norms", collate(rows()[:2]))):
        with torch.no_grad(), plain.reading([POST]) as activations:
            plain(**batch)
        norms[name] = activations[POST][mask_by_hand(batch, plain.skip)]
    assert torch.equal(found[POST], norms["upkeep"])
    logged = twin.state.log_history[0][f"x_norm/{POST}"]
    assert logged == pytest.approx(norms["norms"].norm(dim=-1).mean().item(), rel=1e-12)


# ---- the choice on disk ----


SKIP = {"skip_positions": 1, "skip_tokens": [END]}


def test_the_choice_comes_back_with_the_heads(plain_model, head_configs, tmp_path):
    plain_model.attach_heads(with_skip(head_configs, **SKIP))
    plain_model.save_pretrained(tmp_path)
    assert SAERegGPT2LMHeadModel.from_pretrained(tmp_path).skip == SkipOptions(**SKIP)
    metadata = json.loads((tmp_path / "saes" / POST / "cfg.json").read_text())["metadata"]
    assert metadata["exclude_special_tokens"] == [END]
    assert metadata["seqpos_slice"] == [1, None]
    assert start_heads(tmp_path, head_configs)[0].config.skip == SkipOptions(**SKIP)
    other = SkipOptions(skip_positions=2)
    with pytest.raises(HeadConfigError, match="trained with skip_positions 1"):
        start_heads(tmp_path, with_skip(head_configs, skip_positions=2))
    with pytest.raises(HeadConfigError, match=r"trained with skip_positions 1 .* leave these out"):
        other.for_trained(SkipOptions(**SKIP), tmp_path)
    assert SkipOptions().for_trained(SkipOptions(**SKIP), tmp_path) == SkipOptions(**SKIP)
    assert other.for_trained(SkipOptions(), tmp_path) == other


def test_heads_saved_before_there_was_a_choice_read_every_token(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "saes" / POST / "cfg.json"
    cfg = json.loads(path.read_text())
    assert not {"exclude_special_tokens", "seqpos_slice"} & cfg["metadata"].keys()
    for name in SKIP:
        del cfg["metadata"]["saereg"][name]
    path.write_text(json.dumps(cfg))
    found = SAERegGPT2LMHeadModel.from_pretrained(tmp_path, hook_names=[POST])
    assert found.skip == SkipOptions()


def test_a_plain_control_skips_what_the_heads_of_its_options_would(config):
    model = SAERegGPT2LMHeadModel(config)
    options = HeadsArguments(target_l0=[4], d_sae=[32], **SKIP)
    adapt(model, AdaptationArguments(mode="plain"), options.head_configs(config))
    assert model.skip == SkipOptions(**SKIP) and not model.heads


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, culprit",
    [
        ({"skip_positions": -1}, "skip_positions is -1"),
        ({"skip_tokens": [5, -2]}, "skip_tokens has -2"),
    ],
)
def test_impossible_options_are_refused_by_name(options, culprit):
    for made in (
        SkipOptions,
        HeadsArguments,
        lambda **o: SAEHeadConfig("topk", POST, 4, 8, k=1, **o),
    ):
        with pytest.raises(UserError, match=culprit):
            made(**options)


def test_tokens_that_the_model_lacks_and_heads_that_differ_are_refused(plain_model, head_configs):
    with pytest.raises(HeadConfigError, match="skip_tokens has 128, but the model's 128 tokens"):
        plain_model.attach_heads(with_skip(head_configs, skip_tokens=[128]))
    head_configs[1] = dataclasses.replace(head_configs[1], skip_positions=1)
    with pytest.raises(HeadConfigError, match="give all heads of a model the same"):
        plain_model.attach_heads(head_configs)


def test_embeddings_have_no_ids_to_skip(plain_model, head_configs, input_ids):
    plain_model.attach_heads(with_skip(head_configs, skip_positions=1))
    embedded = plain_model.transformer.wte(input_ids)
    found = plain_model(inputs_embeds=embedded, compute_term=True)
    torch.testing.assert_close(found.term, plain_model(input_ids, compute_term=True).term)
    plain_model.skip_over(SkipOptions(skip_tokens=[END]))
    with pytest.raises(HeadConfigError, match="given embeddings"):
        plain_model(inputs_embeds=embedded, compute_term=True)


def test_heads_are_not_scored_on_tokens_that_they_were_trained_to_skip(
    plain_model, head_configs, input_ids
):
    batches = [{"input_ids": input_ids, "labels": input_ids}]
    plain_model.attach_heads(with_skip(head_configs, **SKIP))
    plain_model.skip_over(SkipOptions())
    base = baselines(plain_model, batches)
    with pytest.raises(
        FidelityError, match=r"trained with skip_positions 1 .* call model.skip_over"
    ):
        fidelity(plain_model, plain_model.heads, batches, base)
