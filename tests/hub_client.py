"""A process of its own that talks to the Hub of `HF_ENDPOINT`: calls in, results out, as JSON.

    python tests/hub_client.py CALLS.json RESULTS.json

A call is `{"do": NAME, …}`, its result `{"value": …}`, or `{"error": SENTENCE}` for a `UserError`.
The client's waiting between retries is skipped.
"""

import hashlib
import json
import sys
import time
import warnings
from pathlib import Path

time.sleep = lambda seconds: None
warnings.simplefilter("ignore")

from hf_saereg.errors import UserError  # noqa: E402


def publish(folder, repo, **options):
    from hf_saereg.cards import publish
    from hf_saereg.hub import PushArguments

    return publish(folder, repo, PushArguments(**options))


def load(repo, **options):
    """Everything that a loaded model holds, by digest."""
    from hf_saereg.modeling import SAERegGPT2LMHeadModel

    model = SAERegGPT2LMHeadModel.from_pretrained(repo, **options)
    return {
        "digests": digests(model),
        "hook_names": model.heads.hook_names,
        "name": [model.name_or_path, model.config.name_or_path],
    }


def head(repo, hook_name, **options):
    from hf_saereg.heads import SAEHead

    found = SAEHead.from_pretrained(repo, hook_name, **options)
    return {"digests": digests(found), "family": type(found).__name__, "training": found.training}


def push_model(folder, repo, **options):
    from hf_saereg.modeling import SAERegGPT2LMHeadModel

    model = SAERegGPT2LMHeadModel.from_pretrained(folder)
    if "save_to" in options:
        save_to = options.pop("save_to")
        return model.save_pretrained(save_to, push_to_hub=True, repo_id=repo, **options)
    return model.push_to_hub(repo, **options)


def train(output_dir, **options):
    """A tiny training; with `push` what its end is called with."""
    from training_job import arguments, heads, rows, tiny_model, trainer

    from hf_saereg.corpora import character_tokenizer

    last = options.pop("push", None)
    args = arguments(output_dir, **options)
    model = tiny_model(heads(family="topk"))
    ours = trainer(
        model,
        args,
        eval_dataset=rows(seed=2),
        processing_class=character_tokenizer(12),
        head_metadata={"dataset_path": "/home/someone/secret/text.txt"},
    )
    ours.train()
    if last is not None:
        ours.push_to_hub(**last)
    return {"digests": digests(ours.model), "steps": ours.state.global_step}


def digests(module):
    return {
        name: f"{tensor.dtype} {hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()}"
        for name, tensor in module.state_dict().items()
    }


def result(call):
    do = globals()[call.pop("do")]
    try:
        return {"value": do(**call)}
    except UserError as error:
        return {"error": str(error), "kind": type(error).__name__}


if __name__ == "__main__":
    calls = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([result(call) for call in calls]))
