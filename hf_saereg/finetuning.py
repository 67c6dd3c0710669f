"""A pre-trained GPT-2 and its text, checked against each other before any training."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from hf_saereg.configuration import DROPOUTS, check_dropout
from hf_saereg.corpora import Blocks, load_blocks, stream_blocks
from hf_saereg.documents import CorpusArguments, CorpusError
from hf_saereg.loading import load_checkpoint
from hf_saereg.modeling import SAERegGPT2LMHeadModel


@dataclass
class BaseModelArguments:
    """Which language model a training starts from."""

    model_name_or_path: str = field(
        default="openai-community/gpt2",
        metadata={"help": "A GPT-2: a folder, or a repository on the Hub; its heads stay there."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Another tokenizer than the model's: folder or repository."}
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout in place of the checkpoint's: heads read what it leaves."},
    )

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    def load(self) -> tuple[SAERegGPT2LMHeadModel, PreTrainedTokenizerBase]:
        """The language model in single precision, without heads, and its tokenizer.

        Raises:
            UserError: if there is none, it is no GPT-2, damaged or incomplete.
        """
        dropout = dict.fromkeys(DROPOUTS, self.dropout)
        return load_checkpoint(self.model_name_or_path, self.tokenizer, hook_names=[], **dropout)


def blocks_for(
    model: SAERegGPT2LMHeadModel, corpus: CorpusArguments, tokenizer: PreTrainedTokenizerBase
) -> Blocks:
    """`train` and `validation` of a text, whole or streamed, that a model can read.

    Args:
        model: whose context a block must fit in.
        corpus: which text.
        tokenizer: the model's.

    Raises:
        CorpusError: if the text cannot be had or cut, or blocks are longer than the context.
    """
    context = model.config.n_positions
    if corpus.block_size > context:
        raise CorpusError(
            f"block_size is {corpus.block_size}, but the model's context is {context} tokens; ask "
            "for no more."
        )
    return (stream_blocks if corpus.stream else load_blocks)(corpus, tokenizer)
