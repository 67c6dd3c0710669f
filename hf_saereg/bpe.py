"""A byte-level BPE like GPT-2's, trained on a text of one's own."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_saereg.documents import CorpusError

END_OF_TEXT = "<|endoftext|>"
BYTES = 256


def train_bpe(
    texts: Iterable[str], vocab_size: int, model_max_length: int
) -> PreTrainedTokenizerFast:
    """Learn merges from a text; every byte has a token, so that nothing is ever unknown.

    Args:
        texts: what the merges are learnt from.
        vocab_size: tokens, with those of the bytes and the end-of-text token.
        model_max_length: longest sequence that the model takes, in tokens.

    Raises:
        CorpusError: if the vocabulary cannot hold the bytes, or the text does not fill it.
    """
    if vocab_size <= BYTES:
        raise CorpusError(
            f"vocab_size is {vocab_size}; it must be above {BYTES}, a token for every byte."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise CorpusError(
            f"The text gives {tokenizer.get_vocab_size()} tokens at most, and vocab_size is "
            f"{vocab_size}; take a longer text or a smaller vocabulary."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        clean_up_tokenization_spaces=False,
    )
