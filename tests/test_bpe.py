"""The BPE: nothing is unknown, and it is of the size that was asked for."""

import pytest
from tiny_checkpoint import WORDS
from transformers import AutoTokenizer

from hf_saereg.bpe import train_bpe
from hf_saereg.documents import CorpusError

TEXTS = [" ".join(WORDS) * 3, "queens and kings shall hear"]


def test_any_text_comes_back_also_after_reloading(tmp_path):
    train_bpe(TEXTS, 270, 16).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the queens", " \n\t é 漢字 <unk>\0", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 270 and tokenizer.model_max_length == 16
    assert len(tokenizer(" queens")["input_ids"]) < len(" queens")
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id] == [0]


def test_the_same_text_gives_the_same_merges():
    one, other = (train_bpe(TEXTS, 275, 16).backend_tokenizer.to_str() for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    "size, sentence", [(256, "a token for every byte"), (5000, "take a longer text")]
)
def test_a_vocabulary_that_cannot_be(size, sentence):
    with pytest.raises(CorpusError, match=sentence):
        train_bpe(TEXTS, size, 16)
