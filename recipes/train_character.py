"""Train a character-level GPT-2 with SAE regularization, and its plain twin; compare them.

    accelerate launch recipes/train_character.py --config recipes/character_demo.yaml

Writes to `output_dir`: checkpoints `plain/` and `regularized/`, SAEs fitted on them afterwards in
`fresh/`, `results.json`, and `index.html`, the page to open. An interrupted run goes on where it
was with `--resume_from_checkpoint true`.
"""

import time
from pathlib import Path

from hf_saereg.character import CharacterJob
from hf_saereg.comparison import compare_models
from hf_saereg.errors import one_sentence_errors
from hf_saereg.report import PAGE_MODULES, require_extra, write_report
from hf_saereg.run_folder import write_json, write_run


def main() -> None:
    """Run the job that the options describe."""
    start = time.monotonic()
    require_extra(*PAGE_MODULES)
    job = CharacterJob.from_options()
    models, trained = {}, {}
    for name in ("plain", "regularized"):
        models[name], trained[name] = job.train(name)
    if not job.arguments.should_save:
        return
    output_dir = Path(job.arguments.output_dir)
    results = compare_models(
        models, trained, job.blocks, job.fresh, job.setup, output_dir / "fresh"
    )
    write_json(output_dir / "results.json", results)
    page = write_report(results, output_dir)
    write_run(output_dir, job.arguments, job.options, {"wall_seconds": job.wall_seconds(start)})
    job.publish()
    print(f"Open {page.resolve()}")


if __name__ == "__main__":
    with one_sentence_errors():
        main()
