"""Any GPT-2 checkpoint with its tokenizer; whatever cannot be used is named."""

import json

import pytest
import torch
from tiny_checkpoint import save_stock_model
from transformers import GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from hf_saereg.checkpoint import CheckpointError
from hf_saereg.corpora import character_tokenizer
from hf_saereg.errors import UserError
from hf_saereg.loading import fingerprint, load_checkpoint


def test_a_stock_model_without_tokenizer_reads_characters(tmp_path):
    folder = save_stock_model(tmp_path / "model")
    model, tokenizer = load_checkpoint(str(folder))
    stock = GPT2LMHeadModel.from_pretrained(folder).eval()
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, stock(input_ids).logits)
    assert tokenizer("Hi", add_special_tokens=False)["input_ids"] == [72, 105]
    assert not model.training and len(model.heads) == 0


def test_a_tokenizer_in_the_folder_is_the_one(tmp_path):
    folder = save_stock_model(tmp_path / "model")
    other = character_tokenizer(7)
    other.save_pretrained(folder)
    assert load_checkpoint(str(folder))[1].model_max_length == 7


def test_a_tokenizer_can_be_named(tmp_path):
    folder = save_stock_model(tmp_path / "model", vocab_size=150)
    with pytest.raises(CheckpointError, match=r"no tokenizer.*150.*--tokenizer"):
        load_checkpoint(str(folder))
    assert len(load_checkpoint(str(folder), "characters")[1]) == 128


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = save_stock_model(tmp_path / "model", vocab_size=100)
    with pytest.raises(CheckpointError, match="128 tokens, but the model knows 100"):
        load_checkpoint(str(folder), "characters")


def no_model(folder):
    folder.mkdir()


def another_model(folder):
    sizes = {"num_layers": 1, "attention_types": [[["global"], 1]], "hidden_size": 8}
    config = GPTNeoConfig(**sizes, num_heads=1, vocab_size=128, max_position_embeddings=8)
    GPTNeoForCausalLM(config).save_pretrained(folder)


def damaged(folder):
    (save_stock_model(folder) / "model.safetensors").write_bytes(b"nothing")


def without_a_block(folder):
    config = json.loads((save_stock_model(folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (no_model, "no config.json"),
        (another_model, "type 'gpt_neo'"),
        (damaged, "weights of .* are damaged"),
        (without_a_block, r"lacks weights, transformer\.h\.2"),
        (lambda folder: None, "neither a folder nor"),
    ],
)
def test_what_is_no_whole_gpt2_is_refused_in_one_sentence(tmp_path, prepare, sentence):
    prepare(tmp_path / "model")
    with pytest.raises(UserError, match=sentence) as caught:
        load_checkpoint(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_fingerprint_is_of_the_weights(tmp_path):
    first, again, other = (
        load_checkpoint(str(save_stock_model(tmp_path / str(i), seed)))[0]
        for i, seed in enumerate((0, 0, 1))
    )
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
