import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import SITES, write_official_weights
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2LMHeadModel

from hf_saereg.heads import HeadConfigError, SAEHeadConfig
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.regularizer import TermOptions, regularization
from hf_saereg.splicing import Splice

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def official(plain_model, tmp_path):
    """A checkpoint laid out as openai-community/gpt2 is: bare names, buffers, tied embeddings."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 32, "n_ctx": 32}
    write_official_weights(tmp_path, plain_model, **shape, vocab_size=128)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [{}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}],
    ids=["plain", "low memory", "device map", "bfloat16"],
)
def test_official_layout_loads_whole_and_gets_fresh_heads(official, head_configs, options):
    dtype = options.get("dtype", torch.float32)
    model, info = SAERegGPT2LMHeadModel.from_pretrained(
        official, heads=head_configs, output_loading_info=True, **options
    )
    assert not any(info.values()), info

    saved = load_file(official / "model.safetensors")
    loaded = {
        name.removeprefix("transformer."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("heads.", "lm_head."))
    }
    buffers = {f"h.{i}.attn.{name}" for i in range(2) for name in ("bias", "masked_bias")}
    assert loaded.keys() == saved.keys() - buffers
    for name, tensor in loaded.items():
        assert torch.equal(tensor, saved[name].to(dtype)), name
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()

    assert model.heads.configs == head_configs
    for head in model.heads:
        assert all(parameter.device.type == "cpu" for parameter in head.parameters())
        assert torch.equal(head.W_enc, head.W_dec.T)
        bound = (6 / 16) ** 0.5
        assert 0.8 * bound < head.W_dec.max() <= bound
        assert not head.b_enc.any()
        assert not head.b_dec.any()

    output = model(**dict.fromkeys(("input_ids", "labels"), torch.arange(1, 9)[None]))
    (output.loss + output.term).backward()
    assert (output.loss + output.term).isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_plain_checkpoint_loads_without_heads_unless_asked(official):
    assert len(SAERegGPT2LMHeadModel.from_pretrained(official).heads) == 0


def test_initialising_the_language_model_leaves_heads_alone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.init_weights()
    after = model.state_dict()
    assert not torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("heads."))


def test_attached_heads_replace_those_that_were_there(model):
    model.attach_heads([SAEHeadConfig("standard", "blocks.1.hook_resid_pre", 16, 4)])
    assert model.heads.hook_names == ["blocks.1.hook_resid_pre"]
    names = {name.split(".")[1] for name in model.state_dict() if name.startswith("heads.")}
    assert names == {"blocks_1_hook_resid_pre"}


def test_heads_can_sit_on_any_subset_of_sites_at_any_size(plain_model, input_ids):
    names = plain_model.hook_names
    for subset in ([names[0]], [names[2]], [names[0], names[2]], names):
        plain_model.attach_heads(
            SAEHeadConfig("standard", name, 16, 5 + 60 * i) for i, name in enumerate(subset)
        )
        output = plain_model(input_ids, labels=input_ids)
        assert list(output.sites) == subset
        values = torch.stack([site.value for site in output.sites.values()])
        torch.testing.assert_close(output.term, values.mean())


@pytest.mark.parametrize(
    ("hook_name", "d_in", "culprit"),
    [
        ("blocks.2.hook_resid_pre", 16, "blocks.2.hook_resid_pre"),
        ("blocks.1.hook_resid_pre", 24, "24"),
        ("../../evil", 16, "../../evil"),
    ],
)
def test_head_that_does_not_fit_is_refused_and_leaves_the_others(model, hook_name, d_in, culprit):
    before = list(model.heads)
    with pytest.raises(HeadConfigError) as caught:
        model.attach_heads([SAEHeadConfig("standard", hook_name, d_in, 8)])
    assert culprit in str(caught.value)
    assert list(model.heads) == before


def test_repeated_site_is_refused(model):
    config = SAEHeadConfig("standard", "blocks.0.hook_resid_pre", 16, 8)
    with pytest.raises(HeadConfigError, match=r"blocks\.0\.hook_resid_pre"):
        model.attach_heads([config, config])


def test_sites_are_block_inputs_and_the_output_of_the_last_block(plain_model, input_ids, by_hand):
    with plain_model.reading(plain_model.hook_names) as activations:
        output = plain_model(input_ids, output_hidden_states=True)
    expected, logits = by_hand(plain_model, input_ids)
    assert list(activations) == plain_model.hook_names == list(expected)
    for hook_name, x in activations.items():
        torch.testing.assert_close(x, expected[hook_name], **CLOSE)
    torch.testing.assert_close(output.logits, logits, **CLOSE)


def test_last_site_is_before_the_final_layer_norm(plain_model, input_ids):
    with plain_model.reading(plain_model.hook_names[-1:]) as activations:
        output = plain_model(input_ids, output_hidden_states=True)
    last = activations[plain_model.hook_names[-1]]
    assert not torch.allclose(last, output.hidden_states[-1], atol=0.1)
    torch.testing.assert_close(plain_model.transformer.ln_f(last), output.hidden_states[-1])


def test_functions_at_sites_replace_the_stream_from_there_on(plain_model, input_ids, by_hand):
    patches = {
        plain_model.hook_names[0]: lambda x: 0.5 * x,
        plain_model.hook_names[2]: lambda x: x.flip(1),
    }
    clean = plain_model(input_ids).logits
    with plain_model.at_sites(patches):
        found = plain_model(input_ids).logits
    torch.testing.assert_close(found, by_hand(plain_model, input_ids, patches)[1], **CLOSE)
    assert not torch.allclose(found, clean, atol=0.1)
    assert torch.equal(plain_model(input_ids).logits, clean)


def number_of_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_functions_at_sites_are_removed_after_an_exception(plain_model, input_ids):
    def fail(x):
        raise RuntimeError("from inside")

    with pytest.raises(RuntimeError, match="from inside"):  # noqa: SIM117
        with plain_model.at_sites(dict.fromkeys(plain_model.hook_names, fail)):
            plain_model(input_ids)
    assert number_of_hooks(plain_model) == 0


def test_unknown_site_leaves_no_function_behind(plain_model):
    functions = {plain_model.hook_names[0]: torch.zeros_like, "blocks.9.hook_resid_pre": None}
    with pytest.raises(KeyError, match=r"blocks\.9"):  # noqa: SIM117
        with plain_model.at_sites(functions):
            pass
    assert number_of_hooks(plain_model) == 0


def test_term_is_that_of_the_activations(model, input_ids, by_hand):
    output = model(input_ids, labels=input_ids)
    expected = regularization(model.heads, by_hand(model, input_ids)[0])
    torch.testing.assert_close(output.term, expected.term, **CLOSE)
    for hook_name, site in output.sites.items():
        torch.testing.assert_close(site.value, expected.sites[hook_name].value, **CLOSE)


def test_loss_and_logits_are_those_of_stock_gpt2(model, input_ids):
    stock = GPT2LMHeadModel(model.config).eval()
    stock.load_state_dict(
        {n: tensor for n, tensor in model.state_dict().items() if not n.startswith("heads.")}
    )
    ours, theirs = model(input_ids, labels=input_ids), stock(input_ids, labels=input_ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_term_is_computed_where_there_are_labels_unless_told_otherwise(model, input_ids):
    with_term = model(input_ids, labels=input_ids)
    assert with_term.term > 0
    assert model(input_ids).term is None
    assert model(input_ids, labels=input_ids, compute_term=False).term is None
    assert torch.equal(model(input_ids, compute_term=True).term, with_term.term)


def test_model_without_heads_has_no_term(plain_model, input_ids):
    assert plain_model(input_ids, labels=input_ids).term is None
    assert plain_model(input_ids, compute_term=True).term is None


def test_every_parameter_gets_a_gradient(model, input_ids):
    output = model(input_ids, labels=input_ids)
    (output.loss + output.term).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(head.W_dec.grad.any() for head in model.heads)


def test_term_reaches_the_blocks_before_its_site_and_none_after(plain_model, input_ids):
    plain_model.attach_heads([SAEHeadConfig("standard", "blocks.1.hook_resid_pre", 16, 32, 0.1)])
    plain_model(input_ids, labels=input_ids).term.backward()
    first, second = plain_model.transformer.h
    assert all(parameter.grad.any() for parameter in first.mlp.parameters())
    assert all(parameter.grad is None for parameter in second.parameters())


def test_without_return_dict_the_output_is_a_tuple(model, input_ids):
    output = model(input_ids, labels=input_ids)
    as_tuple = model(input_ids, labels=input_ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)
    assert torch.equal(as_tuple[-2], output.term)
    assert as_tuple[-1].keys() == output.sites.keys()


def test_generating_never_runs_the_heads(model, monkeypatch):
    def fail(self, x):
        raise AssertionError("a head was run")

    monkeypatch.setattr("hf_saereg.heads.base.SAEHead.losses", fail)
    prompt = torch.arange(1, 5)[None]
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False)
    stock = model.plain_view().generate(prompt, max_new_tokens=6, do_sample=False)
    assert generated.shape == (1, 10)
    assert torch.equal(generated, stock)


def test_a_batch_padded_on_the_left_generates_what_stock_gpt2_does(model, tmp_path):
    model.save_pretrained(tmp_path)
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    rows = [torch.arange(1, 9), torch.arange(40, 43), torch.arange(70, 75)]
    prompt = pad_sequence(rows, batch_first=True, padding_side="left")  # (3, 8), padded with 0
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": (prompt != 0).long()}
    generated = model.generate(prompt, **options)
    assert torch.equal(generated, stock.generate(prompt, **options))
    alone = model.generate(rows[1][None], max_new_tokens=12, do_sample=False)
    assert torch.equal(generated[1, 5:], alone[0])


def test_generating_computes_the_logits_of_the_last_token_alone(model):
    lengths = []
    model.lm_head.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(torch.arange(1, 9)[None], max_new_tokens=3, do_sample=False)
    assert lengths == [1, 1, 1]


def test_the_spliced_pass_has_the_same_positions(model, input_ids):
    positions = (torch.arange(10) + 7)[None]
    model.term = TermOptions(splice_weight=1.0)
    shifted = model.train()(input_ids, labels=input_ids, position_ids=positions)
    usual = model(input_ids, labels=input_ids)
    splices = {hook_name: Splice(model.heads[hook_name], None) for hook_name in SITES}
    with torch.no_grad(), model.at_sites(splices):
        expected = model.plain_view()(input_ids, labels=input_ids, position_ids=positions).loss
    torch.testing.assert_close(shifted.spliced_loss, expected)
    assert not torch.isclose(usual.spliced_loss, expected)


def test_cached_keys_shift_the_mask_to_the_new_tokens(model, input_ids):
    whole = model(input_ids[:1], use_cache=True)
    past = model(input_ids[:1, :6], use_cache=True).past_key_values
    mask = torch.ones(1, 10)
    mask[0, 0] = 0  # a cached position, which no head may miss
    output = model(
        input_ids[:1, 6:], past_key_values=past, attention_mask=torch.ones(1, 10), compute_term=True
    )
    torch.testing.assert_close(output.logits, whole.logits[:, 6:], **CLOSE)
    statistics = next(iter(output.sites.values())).losses.statistics
    assert statistics.tokens == 4
    past = model(input_ids[:1, :6], use_cache=True).past_key_values
    masked = model(input_ids[:1, 6:], past_key_values=past, attention_mask=mask, compute_term=True)
    assert next(iter(masked.sites.values())).losses.statistics.tokens == 4


def test_mask_that_cannot_tell_padding_is_refused(model, input_ids):
    with pytest.raises(ValueError, match=r"\(3, 1, 10, 10\)"):
        model(input_ids, labels=input_ids, attention_mask=torch.ones(3, 1, 10, 10).bool())


def step(model, input_ids):
    """Loss, term and gradients of one training step."""
    model.train()
    model.zero_grad()
    output = model(input_ids, labels=input_ids)
    (output.loss + output.term).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return output.loss, output.term, gradients


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, input_ids, use_reentrant):
    expected = step(model, input_ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.transformer.h[0].gradient_checkpointing
    found = step(model, input_ids)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_replaced_stream(
    model, input_ids, use_reentrant
):
    patches = {model.hook_names[1]: lambda x: 0.3 * x}
    with model.at_sites(patches):
        expected = step(model, input_ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.zero_grad()
    with model.at_sites(patches):
        output = model(input_ids, labels=input_ids)
    (output.loss + output.term).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[2][name], msg=name)


def test_attention_implementations_agree(model, input_ids):
    mask = torch.ones_like(input_ids)
    mask[0, 7:] = 0
    terms = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        terms.append(model(input_ids, labels=input_ids, attention_mask=mask))
    torch.testing.assert_close(terms[0].term, terms[1].term, **CLOSE)
    torch.testing.assert_close(terms[0].loss, terms[1].loss, **CLOSE)


LENGTHS = (10, 6, 1)


def padded(input_ids, side, content, empty_row=False):
    """The first tokens of each row, `LENGTHS` of them, padded with `content`."""
    size = max(LENGTHS) + 2
    rows = [ids[:length] for ids, length in zip(input_ids, LENGTHS, strict=True)]
    if empty_row:
        rows.insert(1, input_ids[0, :0])
    ids = torch.full((len(rows), size), content)
    mask = torch.zeros(len(rows), size, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(size - len(row), size)
        ids[i, place], mask[i, place] = row, 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("empty_row", [False, True], ids=["", "with a row of padding"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_term_of_a_padded_batch_is_that_of_its_tokens(
    model, input_ids, by_hand, side, empty_row, attention
):
    model.set_attn_implementation(attention)
    parts = [
        by_hand(model, ids[None, :length])[0]
        for ids, length in zip(input_ids, LENGTHS, strict=True)
    ]
    tokens = {name: torch.cat([part[name][0] for part in parts]) for name in model.hook_names}
    expected = regularization(model.heads, {name: x[None] for name, x in tokens.items()})
    found = model(**padded(input_ids, side, 0, empty_row))
    torch.testing.assert_close(found.term, expected.term, **CLOSE)
    for name, site in found.sites.items():
        theirs = expected.sites[name].losses.statistics
        assert site.losses.statistics.tokens == sum(LENGTHS)
        for a, b in zip(site.losses.statistics, theirs, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    soiled = model(**padded(input_ids, side, 77, empty_row))
    torch.testing.assert_close(soiled.term, found.term)
    (soiled.loss + soiled.term).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_runs_and_stays_near_float32(model, input_ids):
    loss, term, gradients = step(model, input_ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough_loss, rough_term, rough_gradients = step(model, input_ids)
    torch.testing.assert_close(rough_loss.float(), loss, rtol=0.03, atol=0)
    torch.testing.assert_close(rough_term.float(), term, rtol=0.03, atol=0)
    for name, gradient in rough_gradients.items():
        error = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert error < 0.15, name


def test_plain_view_is_stock_gpt2_with_the_same_parameters(model, input_ids):
    view = model.plain_view()
    assert type(view) is GPT2LMHeadModel
    ours = {n: p for n, p in model.named_parameters() if not n.startswith("heads.")}
    assert {n: p.data_ptr() for n, p in view.named_parameters()} == {
        n: p.data_ptr() for n, p in ours.items()
    }
    assert torch.equal(view(input_ids).logits, model(input_ids).logits)
    assert not view.training
