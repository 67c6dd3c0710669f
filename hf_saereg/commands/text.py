"""Which text a command lets a model read."""

from dataclasses import asdict, dataclass, field

from datasets import DatasetDict
from transformers import GPT2Config, PreTrainedTokenizerBase

from hf_saereg.corpora import CorpusArguments, CorpusError, load_blocks

DEFAULT_BLOCK_SIZE = 128


@dataclass
class TextArguments(CorpusArguments):
    """As `CorpusArguments`, but cut to the context of a model that is there already."""

    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens in a block; the model's context by default, at most 128."},
    )

    def __post_init__(self) -> None:
        self.cut_to(self.block_size or DEFAULT_BLOCK_SIZE)

    def cut_to(self, block_size: int) -> CorpusArguments:
        """The same text in blocks of a size.

        Raises:
            CorpusError: if a number is out of its range.
        """
        return CorpusArguments(**asdict(self) | {"block_size": block_size})

    def for_model(self, config: GPT2Config) -> CorpusArguments:
        """The same text in blocks that a model can read.

        Raises:
            CorpusError: if they were asked to be longer than its context.
        """
        if self.block_size is not None and self.block_size > config.n_positions:
            raise CorpusError(
                f"block_size is {self.block_size}, but the model's context is "
                f"{config.n_positions} tokens; ask for no more."
            )
        return self.cut_to(self.block_size or min(config.n_positions, DEFAULT_BLOCK_SIZE))

    def blocks(self, config: GPT2Config, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
        """`train` and `validation` for a model.

        Raises:
            CorpusError: if the text cannot be had, or cut.
        """
        return load_blocks(self.for_model(config), tokenizer)
