"""Pre-train a small GPT-2 with a BPE of its own: a base for fine-tuning where none can be fetched.

    accelerate launch recipes/pretrain_gpt2.py --config recipes/gpt2_base.yaml

Writes to `output_dir` a plain GPT-2 checkpoint with its tokenizer, and `run.json`. An interrupted
run goes on where it was with `--resume_from_checkpoint true`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, set_seed

from hf_saereg.bpe import train_bpe
from hf_saereg.configuration import CharacterModelArguments
from hf_saereg.corpora import CorpusArguments, collate_blocks, load_blocks
from hf_saereg.documents import load_documents
from hf_saereg.errors import one_sentence_errors
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.options import as_record, parse_options
from hf_saereg.publishing import publish_finished
from hf_saereg.run_folder import check_run_folder, finished_figures, write_run
from hf_saereg.trainer import SAERegArguments, SAERegTrainer


@dataclass
class VocabularyArguments:
    """The tokenizer."""

    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the BPE."})


OPTION_CLASSES = (SAERegArguments, CorpusArguments, CharacterModelArguments, VocabularyArguments)


def main() -> None:
    """Run the training that the options describe."""
    start = time.monotonic()
    parsed = parse_options(*OPTION_CLASSES)
    arguments, corpus, shape, vocabulary = parsed
    options, folder = as_record(parsed), Path(arguments.output_dir)

    with arguments.main_process_first():
        if arguments.should_save:
            check_run_folder(folder, options, resume=arguments.resumes)
            if not finished_figures(folder):
                texts = load_documents(corpus)["text"]
                bpe = train_bpe(texts, vocabulary.vocab_size, corpus.block_size)
                write_run(folder, arguments, options)
                bpe.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        blocks = load_blocks(corpus, tokenizer)
    if finished_figures(folder):
        print(f"{folder} holds this run, finished.")
        publish_finished(arguments)
        return
    set_seed(arguments.seed)
    trainer = SAERegTrainer(
        SAERegGPT2LMHeadModel(shape.config(corpus.block_size, tokenizer)),
        arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=collate_blocks,
        processing_class=tokenizer,
    )
    figures = trainer.train_to_the_end(start)
    if arguments.push_to_hub:
        trainer.push_to_hub()
    write_run(folder, arguments, options, figures)
    if arguments.should_save:
        print({name: round(value, 4) for name, value in figures.items()})


if __name__ == "__main__":
    with one_sentence_errors():
        main()
