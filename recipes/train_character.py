"""Train a character-level GPT-2 with SAE regularization, and its plain twin; compare them.

    accelerate launch recipes/train_character.py --config recipes/character_demo.yaml

Writes to `output_dir`: checkpoints `plain/` and `regularized/`, SAEs fitted on them afterwards in
`fresh/`, `results.json`, and `index.html`, the page to open. An interrupted run goes on where it
was with `--resume_from_checkpoint true`.
"""

import copy
import time
from pathlib import Path

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase, set_seed

from hf_saereg.comparison import compare_models, describe_setup
from hf_saereg.configuration import CharacterModelArguments, HeadsArguments, TwinArguments
from hf_saereg.corpora import CorpusArguments, character_tokenizer, collate_blocks, load_blocks
from hf_saereg.errors import one_sentence_errors
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.options import as_record, parse_options
from hf_saereg.regularizer import TermOptions
from hf_saereg.report import write_report
from hf_saereg.run_folder import check_run_folder, finished_figures, write_json, write_run
from hf_saereg.sweep import FreshHeadsArguments
from hf_saereg.trainer import SAERegArguments, SAERegTrainer, last_complete_checkpoint


def train(
    model: SAERegGPT2LMHeadModel,
    arguments: SAERegArguments,
    blocks: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, object],
) -> dict[str, float]:
    """Train one model into its own folder, or go on with it; returns the figures of its run."""
    folder, start = Path(arguments.output_dir), time.monotonic()
    if figures := finished_figures(folder):
        return figures
    trainer = SAERegTrainer(
        model,
        arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=collate_blocks,
        processing_class=tokenizer,
        head_metadata={"model_name": folder.name, "dataset_path": options["dataset"]},
    )
    write_run(folder, arguments, options)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()
    figures = trainer.summary() | {"wall_seconds": time.monotonic() - start}
    write_run(folder, arguments, options, figures)
    return figures


def main() -> None:
    """Run the job that the options describe."""
    parsed = parse_options(
        SAERegArguments,
        HeadsArguments,
        TermOptions,
        TwinArguments,
        CorpusArguments,
        CharacterModelArguments,
        FreshHeadsArguments,
    )
    arguments, heads, term, twin, corpus, shape, fresh = parsed
    options, output_dir, start = as_record(parsed), Path(arguments.output_dir), time.monotonic()
    with arguments.main_process_first():
        if arguments.should_save:
            check_run_folder(output_dir, options, resume=arguments.resumes)
        tokenizer = character_tokenizer(corpus.block_size)
        blocks = load_blocks(corpus, tokenizer)
    config = shape.config(corpus.block_size, tokenizer)
    setup = describe_setup(arguments, heads, corpus, fresh, config, blocks)
    models, trained = {}, {}
    for name in ("plain", "regularized"):
        set_seed(arguments.seed)
        models[name] = SAERegGPT2LMHeadModel(config)
    models["regularized"].attach_heads(heads.head_configs(config), term)
    write_run(output_dir, arguments, options)
    for name, model in models.items():
        own = copy.copy(arguments)
        own.output_dir = str(output_dir / name)
        own.warmup_steps = twin.warmup_steps_of(name, arguments.warmup_steps)
        trained[name] = train(model, own, blocks, tokenizer, options)
        models[name] = SAERegGPT2LMHeadModel.from_pretrained(own.output_dir).to(own.device)
    if not arguments.should_save:
        return
    results = compare_models(models, trained, blocks, fresh, setup, output_dir / "fresh")
    write_json(output_dir / "results.json", results)
    page = write_report(results, output_dir)
    write_run(output_dir, arguments, options, {"wall_seconds": time.monotonic() - start})
    print(f"Open {page.resolve()}")


if __name__ == "__main__":
    with one_sentence_errors():
        main()
