"""A tiny training run, for tests: imported by them, or started by `accelerate launch`.

    accelerate launch … tests/training_job.py FOLDER OPTIONS_AS_JSON

Every process writes to a folder of its own, so that a test sees who wrote what.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, TrainerCallback, set_seed

from hf_saereg.heads import SAEHeadConfig
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.regularizer import TermOptions
from hf_saereg.trainer import SAERegArguments, SAERegTrainer

VOCABULARY, CONTEXT, WIDTH, N_LAYER, D_SAE = 32, 12, 8, 2, 24
SITES = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
LENGTHS = [12, 3, 7, 12, 5, 2, 10, 4, 9, 6, 11, 8]  # two in a row never sum to the same


def heads(reconstruction_weight=1.0, family="standard"):
    own = {"k": 4} if family == "topk" else {"sparsity_coefficient": 0.1}
    return [
        SAEHeadConfig(
            family, site, WIDTH, D_SAE, reconstruction_weight=reconstruction_weight, **own
        )
        for site in SITES
    ]


def upkept_heads(**options):
    """Heads with something to count, to steer and to keep, whose losses are means over tokens."""
    own = [
        {"architecture": "standard", "target_l0": 5, "unit_decoder_norm": True},
        {"architecture": "gated", "tied": True, "target_l0": 3},
        {"architecture": "topk", "k": 2, "auxk": 6},
    ]
    shared = {"normalization": "layer_norm", "dead_after_tokens": 60, "reconstruction_weight": 0.5}
    return [
        SAEHeadConfig(hook_name=site, d_in=WIDTH, d_sae=D_SAE, **shared | options | option)
        for site, option in zip(SITES, own, strict=True)
    ]


def weights(folder):
    """Every tensor of a checkpoint, those of heads below their hook name."""
    found = load_file(folder / "model.safetensors")
    for path in folder.glob("saes/*/sae_weights.safetensors"):
        found |= {f"{path.parent.name}/{name}": t for name, t in load_file(path).items()}
    return found


def lose_a_weight(folder, name):
    """Take one tensor of the language model out of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def tiny_model(head_configs=(), dropout=0.0, seed=0, dtype=torch.float64, term=None):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_layer=N_LAYER,
        n_head=2,
        n_embd=WIDTH,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    )
    model = SAERegGPT2LMHeadModel(config)
    model.attach_heads(head_configs, term)
    if dtype == torch.float64:
        model.loss_function = exact_ce
    return model.to(dtype)


def exact_ce(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """As `transformers` has it, without its rounding to float32: sums compare to the last digit."""
    ce = summed_ce(logits, labels)
    return ce / (
        (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    )


def summed_ce(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def rows(lengths=LENGTHS, seed=1):
    """Sequences of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    return [_row(torch.randint(VOCABULARY, (CONTEXT,), generator=generator), n) for n in lengths]


def _row(input_ids, length):
    mask = (torch.arange(CONTEXT) < length).long()
    labels = torch.where(mask.bool(), input_ids, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(output_dir, **changes):
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SAERegArguments(output_dir=str(output_dir), **(options | changes))


def trainer(model, args, train=None, **changes):
    return SAERegTrainer(
        model,
        args,
        train_dataset=rows() if train is None else train,
        data_collator=collate,
        **changes,
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, as the optimizer is about to use them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.by_name = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
        }


def run(folder, rank, options):
    kind = options.pop("kind")
    if (
        kind == "published"
    ):  # the ratio is per process here, per micro-batch there: of the same rows
        model = tiny_model(heads(reconstruction_weight=3.0))
    else:
        model = tiny_model(upkept_heads(), term=TermOptions(sites_per_step=2, splice_weight=0.3))
    args = arguments(folder / f"rank_{rank}", **options)
    ours = trainer(model, args, eval_dataset=rows([CONTEXT] * 8, seed=2))
    ours.train()
    ours.save_model()
    figures = {"world_size": args.world_size, "log": ours.state.log_history}
    figures["state"] = {name: buffer.tolist() for name, buffer in model.heads.named_buffers()}
    (folder / f"figures_{rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    run(Path(sys.argv[1]), int(os.environ["RANK"]), options)
