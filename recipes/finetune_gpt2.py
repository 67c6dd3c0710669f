"""Fine-tune a pre-trained GPT-2 with SAE regularization, in one of several modes.

    accelerate launch recipes/finetune_gpt2.py --config recipes/gpt2_small.yaml --mode joint

Writes to `output_dir`: the model, or its adapter, with `saes/` beside it; the adapter merged into
the model in `merged/`; `run.json` with what was measured. An interrupted run goes on where it was
with `--resume_from_checkpoint true`.
"""

import time
from pathlib import Path

from transformers import set_seed

from hf_saereg.adaptation import AdaptationArguments, adapt
from hf_saereg.configuration import HeadsArguments
from hf_saereg.corpora import CorpusArguments, collate_blocks
from hf_saereg.errors import one_sentence_errors
from hf_saereg.finetuning import BaseModelArguments, blocks_for
from hf_saereg.options import as_record, parse_options
from hf_saereg.publishing import publish_finished
from hf_saereg.regularizer import TermOptions
from hf_saereg.run_folder import check_run_folder, finished_figures, write_run
from hf_saereg.trainer import SAERegArguments, SAERegTrainer

OPTION_CLASSES = (
    SAERegArguments,
    BaseModelArguments,
    AdaptationArguments,
    HeadsArguments,
    TermOptions,
    CorpusArguments,
)


def main() -> None:
    """Run the training that the options describe."""
    start = time.monotonic()
    parsed = parse_options(*OPTION_CLASSES)
    arguments, base, adaptation, heads, term, corpus = parsed
    options, folder = as_record(parsed), Path(arguments.output_dir)

    with arguments.main_process_first():
        if arguments.should_save:
            check_run_folder(folder, options, resume=arguments.resumes)
        model, tokenizer = base.load()
        blocks = blocks_for(model, corpus, tokenizer)
    if finished_figures(folder):
        print(f"{folder} holds this run, finished.")
        publish_finished(arguments)
        return
    set_seed(arguments.seed)
    adapt(model, adaptation, heads.head_configs(model.config), term)

    trainer = SAERegTrainer(
        model,
        arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=collate_blocks,
        processing_class=tokenizer,
        head_metadata={"model_name": folder.name, "dataset_path": corpus.dataset},
    )
    write_run(folder, arguments, options)
    figures = trainer.train_to_the_end(start)
    if arguments.push_to_hub:
        trainer.push_to_hub()
    elif arguments.should_save:
        trainer.describe(folder)  # with what the summary measured
    if model.has_adapters:
        trainer.save_merged(folder / "merged")
    write_run(folder, arguments, options, figures)
    if arguments.should_save:
        print({name: round(value, 4) for name, value in figures.items()})


if __name__ == "__main__":
    with one_sentence_errors():
        main()
