"""Heads in SAELens, and SAEs of SAELens as heads: the same features, the same reconstructions."""

import copy
import json

import pytest
import torch
from conftest import SITES

from hf_saereg.errors import UserError
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.heads import FAMILIES as OUR_FAMILIES
from hf_saereg.heads import HeadConfigError, SAEHeadConfig, SkipOptions, make_head
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.folder import load_head, save_heads
from hf_saereg.heads.saelens import load_saelens_head

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: the extra [interop]")

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY  # noqa: E402

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty")

SITE, D_IN, D_SAE = SITES[1], 16, 48
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NEAR = {"rtol": 1e-4, "atol": 1e-4}  # after all blocks
UNPROCESSED = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
FAMILIES = {
    "standard": {},
    "standard tied": {"architecture": "standard", "tied": True},
    "gated": {},
    "gated tied": {"architecture": "gated", "tied": True},
    "jumprelu": {},
    "topk": {"k": 5},
    "batchtopk": {"k": 5},
}


@pytest.fixture
def x(plain_model, input_ids):
    """(tokens, d_in) activations of a model, at the site."""
    with plain_model.reading([SITE]) as activations:
        plain_model(input_ids)
    return activations[SITE].flatten(0, 1).detach()


def trained_head(name, x, **options):
    """A head none of whose weights is as it began, and which has seen a batch."""
    options = {"architecture": name} | FAMILIES[name] | options
    torch.manual_seed(0)
    head = make_head(SAEHeadConfig(hook_name=SITE, d_in=D_IN, d_sae=D_SAE, **options))
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for _ in range(3):
        head.train().losses(x)
    return head.eval()


@pytest.mark.parametrize("normalization", ["published", "layer_norm", "variance"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sae_lens_computes_what_every_head_computes(x, tmp_path, name, normalization):
    head = trained_head(name, x, normalization=normalization)
    metadata = {"model_name": "someone/model", "context_size": 32, "dataset_path": "plays"}
    save_heads([head], tmp_path, metadata)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "saes" / SITE)
    features = head.encode(x)
    assert 0 < (features > 0).float().mean() < 1
    torch.testing.assert_close(theirs.encode(x), features, **CLOSE)
    torch.testing.assert_close(theirs(x), head(x), **CLOSE)
    said = theirs.cfg.metadata
    assert (said.model_name, said.hook_name, said.context_size) == ("someone/model", SITE, 32)
    assert said.dataset_path == "plays" and said.prepend_bos is False
    assert said.model_from_pretrained_kwargs == dict.fromkeys(UNPROCESSED, False)
    expected = {"batchtopk": "jumprelu"}.get(head.architecture, head.architecture)
    assert theirs.cfg.architecture() == expected


def test_what_a_head_skips_is_said_in_their_words_and_read_again(x, tmp_path):
    skip = {"skip_positions": 1, "skip_tokens": [99]}
    save_heads([trained_head("topk", x, **skip)], tmp_path)
    folder = tmp_path / "saes" / SITE
    said = sae_lens.SAE.load_from_disk(folder).cfg.metadata
    assert (said.seqpos_slice, said.exclude_special_tokens) == ([1, None], [99])
    assert list(range(4))[slice(*said.seqpos_slice)] == [1, 2, 3]
    assert load_saelens_head(folder).config.skip == SkipOptions(**skip)
    assert load_saelens_head(folder, skip_positions=2).config.skip_positions == 2


def test_raw_topk_has_no_form_there(x, tmp_path):
    head = trained_head("topk", x, rectified=False)
    with pytest.raises(HeadConfigError, match="rectified"):
        save_heads([head], tmp_path)
    assert not list(tmp_path.iterdir())


# ---- the other way ----

INFERENCE = {
    "standard": sae_lens.StandardSAEConfig,
    "gated": sae_lens.GatedSAEConfig,
    "jumprelu": sae_lens.JumpReLUSAEConfig,
    "topk": sae_lens.TopKSAEConfig,
}


FOREIGN = sorted({*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY} - OUR_FAMILIES.keys())


def their_sae(architecture, **options):
    """An SAE of SAELens, all of whose parameters are random."""
    own = {"k": 5} if architecture == "topk" else {}
    config = INFERENCE[architecture](d_in=D_IN, d_sae=D_SAE, **own, **options)
    config.metadata.hook_name = SITE
    sae = sae_lens.SAE.get_sae_class_for_architecture(architecture)(config)
    torch.manual_seed(0)
    for name, parameter in sae.named_parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
        if name == "threshold":
            parameter.data = parameter.data / 3  # some below 0
    return sae


def assert_same(ours, theirs, x):
    features = theirs.encode(x)
    assert 0 < (features > 0).float().mean() < 1
    torch.testing.assert_close(ours.encode(x), features, **CLOSE)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("b_dec_from_input", [True, False])
@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", INFERENCE)
def test_head_computes_what_sae_lens_computes(
    x, tmp_path, architecture, normalization, b_dec_from_input
):
    theirs = their_sae(
        architecture,
        normalize_activations=normalization,
        apply_b_dec_to_input=b_dec_from_input,
    )
    theirs.save_model(tmp_path)
    ours = load_saelens_head(tmp_path)
    assert (ours.architecture, ours.config.hook_name) == (architecture, SITE)
    assert_same(ours, theirs, x)


@pytest.fixture
def centred_model(plain_model):
    """What TransformerLens's `center_writing_weights` makes of the model."""
    twin = copy.deepcopy(plain_model)
    twin.lm_head.weight = torch.nn.Parameter(plain_model.lm_head.weight.detach().clone())
    gpt2 = twin.transformer
    writers = [getattr(block, part).c_proj for block in gpt2.h for part in ("attn", "mlp")]
    written = [gpt2.wte.weight, gpt2.wpe.weight]
    written += [tensor for writer in writers for tensor in (writer.weight, writer.bias)]
    for tensor in written:  # (…, d_in)
        tensor.data -= tensor.data.mean(dim=-1, keepdim=True)
    return twin


def their_centred_sae(architecture, **options):
    theirs = their_sae(architecture, **options)
    theirs.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    with torch.no_grad():
        theirs.b_dec += 0.5  # its mean is not 0
    return theirs


@torch.no_grad()
def predictions(model, input_ids, splices):
    with model.at_sites(splices):
        return model(input_ids).logits.log_softmax(-1)


@pytest.mark.parametrize("b_dec_from_input", [True, False])
@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", INFERENCE)
def test_an_sae_of_the_centred_stream_reads_ours(
    plain_model, centred_model, input_ids, tmp_path, architecture, normalization, b_dec_from_input
):
    theirs = their_centred_sae(
        architecture, normalize_activations=normalization, apply_b_dec_to_input=b_dec_from_input
    )
    theirs.save_model(tmp_path / "theirs")
    ours = load_saelens_head(tmp_path / "theirs")
    activations = []
    for model in (plain_model, centred_model):
        with model.reading([SITE]) as read:
            model(input_ids)
        activations.append(read[SITE].flatten(0, 1).detach())
    x, centred = activations
    mean = x.mean(dim=-1, keepdim=True)
    assert mean.abs().mean() > 0.05
    torch.testing.assert_close(centred, x - mean, **CLOSE)
    torch.testing.assert_close(ours.encode(x), theirs.encode(centred), **CLOSE)
    layer_norm = normalization == "layer_norm"  # which puts each token's mean back
    expected = theirs(centred) + (mean if layer_norm else 0)
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    # spliced in, alone and with one further on, the two models predict the same
    further = load_saelens_head(tmp_path / "theirs", hook_name=SITES[2])
    ours, theirs = {SITE: ours}, {SITE: theirs}
    alone = predictions(plain_model, input_ids, ours)
    torch.testing.assert_close(alone, predictions(centred_model, input_ids, theirs), **NEAR)
    ours[SITES[2]] = further
    theirs[SITES[2]] = lambda x: theirs[SITE](x - x.mean(dim=-1, keepdim=True))
    both = predictions(plain_model, input_ids, ours)
    torch.testing.assert_close(both, predictions(centred_model, input_ids, theirs), **NEAR)
    unspliced = predictions(plain_model, input_ids, {})
    assert (alone - unspliced).abs().max() > 0.1 and (both - alone).abs().max() > 0.1


@pytest.mark.parametrize("architecture", INFERENCE)
def test_a_centred_sae_that_was_saved_again_is_not_folded_again(x, tmp_path, architecture):
    their_centred_sae(architecture).save_model(tmp_path / "theirs")
    ours = load_saelens_head(tmp_path / "theirs")
    save_heads([ours], tmp_path / "ours")
    folder = tmp_path / "ours" / "saes" / SITE
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert metadata["model_from_pretrained_kwargs"]["center_writing_weights"] is False
    for again in (load_saelens_head(folder), load_head(tmp_path / "ours", SITE)):
        torch.testing.assert_close(again.W_enc, ours.W_enc, rtol=0, atol=0)
        torch.testing.assert_close(again.encode(x), ours.encode(x), **CLOSE)
    assert_same(ours, sae_lens.SAE.load_from_disk(folder), x)


def test_features_scaled_by_decoder_norms_are_folded(x, tmp_path):
    theirs = their_sae("topk", rescale_acts_by_decoder_norm=True)
    theirs.save_model(tmp_path)
    assert_same(load_saelens_head(tmp_path), theirs, x)


def test_activations_scaled_in_training_are_folded(x, tmp_path):
    theirs = their_sae("standard", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5}))
    ours = load_saelens_head(tmp_path)
    torch.testing.assert_close(ours.encode(x), theirs.encode(2.5 * x), **CLOSE)
    theirs.fold_activation_norm_scaling_factor(2.5)
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("for_inference", [True, False])
@pytest.mark.parametrize("rescaled", [True, False])
def test_batchtopk_comes_with_its_threshold(x, tmp_path, rescaled, for_inference):
    config = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=5.0, rescale_acts_by_decoder_norm=rescaled
    )
    config.metadata.hook_name = SITE
    training = sae_lens.BatchTopKTrainingSAE(config)
    for parameter in training.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    training.topk_threshold.fill_(0.4)
    training.save_inference_model(tmp_path / "inference")
    training.save_model(tmp_path / "training")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    ours = load_saelens_head(tmp_path / ("inference" if for_inference else "training"))
    assert ours.architecture == ("jumprelu" if for_inference else "batchtopk")
    # with rescaling their features are in other units, the reconstruction is the same
    assert ((ours.encode(x) > 0) == (theirs.encode(x) > 0)).all()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_matryoshka_comes_as_what_it_is_saved_as_for_inference(x, tmp_path):
    config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=5.0, matryoshka_widths=[16, D_SAE]
    )
    config.metadata.hook_name = SITE
    training = sae_lens.MatryoshkaBatchTopKTrainingSAE(config)
    for parameter in training.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    training.topk_threshold.fill_(0.4)
    training.save_inference_model(tmp_path)
    assert_same(load_saelens_head(tmp_path), sae_lens.SAE.load_from_disk(tmp_path), x)


def test_their_sae_serves_as_a_head(plain_model, input_ids, tmp_path):
    """Evaluated, trained on as a regularizer, and saved again."""
    their_sae("jumprelu").save_model(tmp_path / "theirs")
    head = load_saelens_head(tmp_path / "theirs", reconstruction_weight=2.0)
    assert head.config.reconstruction_weight == 2.0
    batches = [{"input_ids": input_ids, "labels": input_ids}]
    scores = fidelity(plain_model, HeadBank([head]), batches, baselines(plain_model, batches))
    assert 0 < scores.sites[SITE].statistics.l0 < D_SAE

    plain_model.place_heads([head])
    output = plain_model(input_ids, labels=input_ids)
    (output.loss + output.term).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["W_dec"].abs().max() > 0
    plain_model.save_pretrained(tmp_path / "ours")
    again = type(plain_model).from_pretrained(tmp_path / "ours").heads[SITE]
    x = torch.randn(7, D_IN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.encode(x), head.encode(x))


@pytest.mark.parametrize(
    ("options", "changes", "culprits"),
    [
        ({"normalize_activations": "expected_average_only_in"}, {}, ["expected_average_only_in"]),
        ({"normalize_activations": "covariance_whitening"}, {}, ["covariance_whitening", "fold"]),
        ({"reshape_activations": "hook_z"}, {}, ["attention"]),
        *[({}, {"architecture": name}, [f"'{name}' SAE", "standard"]) for name in FOREIGN],
        ({}, {"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, ["blocks.1.hook_mlp_out"]),
        ({}, {"metadata": {}}, ["None"]),
        ({}, {"d_sae": 47}, ["(48, 16)", "(47, 16)"]),
    ],
)
def test_what_no_head_computes_is_refused(tmp_path, options, changes, culprits):
    theirs = their_sae("standard")
    theirs.save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | options | changes))
    with pytest.raises(UserError) as caught:
        load_saelens_head(tmp_path)
    assert "\n" not in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)
