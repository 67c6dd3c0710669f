"""A short real training run: where the measured heads and activations come from.

Notable:
- standard heads on the packaged plays, from the published initialisation, where half of all latents
  are active; after every step each site's sparsity coefficient is raised or lowered by 4 % towards
  an L0 of 15, which so strong a pull reaches within some 60 steps
- saved early (after 1 % of the steps, most latents still active), midway (after 4 %, on the way
  down) and late (at the end); what L0 each reached is measured on the benchmark's own batch
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.paths import adamw, run_path
from benchmarks.shapes import Shape
from hf_saereg.errors import UserError
from hf_saereg.heads import SAEHead, SAEHeadConfig, make_head
from hf_saereg.kernels import batch_threshold
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.run_folder import write_json

STAGES = {"early": 0.01, "midway": 0.04, "late": 1.0}  # after which part of the steps
TARGET_L0 = 15.0
NEAR = (10.0, 20.0)  # the L0 of a late head, trained so or shifted to the target
FINISHED = "training.json"  # written last: losses by step, sites whose biases were shifted
LEARNING_RATE, HEADS_LEARNING_RATE = 1e-3, 3e-3
HOW = (
    "standard heads trained with the model on the packaged plays, learning rate "
    f"{LEARNING_RATE:g} (heads {HEADS_LEARNING_RATE:g}), each site's coefficient driven by 4 % a "
    f"step towards L0 {TARGET_L0:g}; late, a head still outside {NEAR[0]:g} to {NEAR[1]:g} has all "
    "its biases shifted by one number (its site is in `shifted`)"
)


def training_run(
    shape: Shape, path: str, steps: int, tokens: int, precision: str = "float32"
) -> Iterator[tuple[SAERegGPT2LMHeadModel, float]]:
    """Train from scratch; yields the model and CE + term after every step.

    Args:
        shape: of model, heads and batch.
        path: how the term is computed.
        steps: how many.
        tokens: of a step.
        precision: one of `paths.PRECISIONS`.
    """
    torch.manual_seed(0)
    model = SAERegGPT2LMHeadModel(shape.model_config())
    model.attach_heads(shape.head_configs())
    model.train().to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = adamw(
        [
            {"params": list(model.plain_view().parameters())},
            {"params": list(model.heads.parameters()), "lr": HEADS_LEARNING_RATE},
        ],
        LEARNING_RATE,
    )
    batches = shape.batches(tokens).to(model.device)
    for step in tqdm(range(steps), desc=f"training, {path}", dynamic_ncols=True):
        output = run_path(path, model, optimizer, batches[step % len(batches)], precision)
        for head in model.heads:
            drive(head, output.sites[head.config.hook_name].losses.statistics.l0, TARGET_L0)
        yield model, (output.loss + output.term).item()


def drive(head: SAEHead, l0: float, target: float) -> None:
    """Raise or lower a head's sparsity coefficient by 4 %, towards a target."""
    head.config.sparsity_coefficient *= 1.04 if l0 > target else 1 / 1.04


def fitted_head(x: Tensor, d_sae: int, target_l0: float, steps: int = 80) -> SAEHead:
    """A standard head trained on given activations, whose L0 on them is the target.

    Training alone leaves it near the target, more or less so by its size; see `shift_to_l0`.

    Args:
        x: (tokens, d_in), detached.
        d_sae: number of latents.
        target_l0: where its coefficient is driven to.
        steps: of up to 1,024 tokens each.
    """
    torch.manual_seed(0)
    head = make_head(SAEHeadConfig("standard", "fitted", x.shape[1], d_sae, 0.05)).to(x.device)
    optimizer = adamw(head.parameters(), HEADS_LEARNING_RATE)
    pieces = x.split(1024)
    for step in range(steps):
        losses = head.losses(pieces[step % len(pieces)])
        optimizer.zero_grad()
        (losses.reconstruction + losses.sparsity).backward()
        optimizer.step()
        drive(head, losses.statistics.l0, target_l0)
    shift_to_l0(head, x, target_l0)
    return head


@torch.no_grad()
def shift_to_l0(head: SAEHead, x: Tensor, l0: float) -> None:
    """Shift all encoder biases of a standard head by one number, so that its L0 on x is this.

    What a step costs is then compared at the same L0 whatever the head's size, with the directions
    and the unequal densities of latents that training gave it.

    Args:
        head: trained on x or its like.
        x: (tokens, d_in), detached.
        l0: mean number of active latents of a token.
    """
    centred, active = x - head.b_dec, round(l0 * len(x))
    head.b_enc -= batch_threshold(centred, head.W_enc, head.b_enc, active)


@torch.no_grad()
def shift_far_heads(model: SAERegGPT2LMHeadModel, input_ids: Tensor) -> list[str]:
    """Shift the biases of heads whose L0 is far from the target; the names of their sites.

    Args:
        model: after its run.
        input_ids: (sequences, sequence), what L0 is measured on.
    """
    with model.reading(model.hook_names) as activations:
        model(input_ids=input_ids.to(model.device))
    shifted = []
    for head in model.heads:
        x = activations[head.config.hook_name].flatten(0, 1)
        if not NEAR[0] <= head.losses(x).statistics.l0 <= NEAR[1]:
            shift_to_l0(head, x, TARGET_L0)
            shifted.append(head.config.hook_name)
    return shifted


def checkpoints(shape: Shape, folder: Path) -> dict[str, Path]:
    """Checkpoints by stage: those in `folder`, made there first where it has none.

    Args:
        shape: of model and heads.
        folder: created if absent.

    Raises:
        UserError: if those in `folder` were made otherwise.
    """
    finished = folder / FINISHED
    made = _made(shape)
    if finished.is_file():
        record = json.loads(finished.read_text())
        before = {name: record.get(name) for name in made}
        if before != made:
            raise UserError(
                f"{folder} has checkpoints that were made otherwise ({before}, now {made}); delete "
                "it, or give another --checkpoints."
            )
    else:
        losses, shifted = [], []
        steps = shape.training_steps
        ends = {
            max(earliest, round(part * steps)): stage
            for earliest, (stage, part) in enumerate(STAGES.items(), 1)
        }
        for model, loss in training_run(shape, "auto", steps, shape.training_tokens):
            losses.append(loss)
            stage = ends.get(len(losses))
            if stage == "late":
                shifted = shift_far_heads(model, shape.batches(shape.cpu_tokens)[0])
            if stage:
                model.save_pretrained(folder / stage)
        write_json(finished, {**made, "losses": losses, "shifted": shifted})
    return {stage: folder / stage for stage in STAGES}


def how_made(shape: Shape, folder: Path) -> dict[str, Any]:
    """What `checkpoints` made there and how, for the record.

    Args:
        shape: of model and heads.
        folder: of the checkpoints.
    """
    return _made(shape) | {"shifted": json.loads((folder / FINISHED).read_text())["shifted"]}


def _made(shape: Shape) -> dict[str, Any]:
    return {
        "how": HOW,
        "after_part_of_the_steps": STAGES,
        "steps": shape.training_steps,
        "tokens_a_step": shape.training_tokens,
    }
