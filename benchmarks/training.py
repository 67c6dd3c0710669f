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

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.paths import adamw, run_path
from benchmarks.shapes import Shape
from hf_saereg.heads import SAEHead, SAEHeadConfig, make_head
from hf_saereg.kernels import batch_threshold
from hf_saereg.modeling import SAERegGPT2LMHeadModel

STAGES = {"early": 0.01, "midway": 0.04, "late": 1.0}  # after which part of the steps
TARGET_L0 = 15.0
LEARNING_RATE, HEADS_LEARNING_RATE = 1e-3, 3e-3
HOW = (
    "standard heads trained with the model on the packaged plays, learning rate "
    f"{LEARNING_RATE:g} (heads {HEADS_LEARNING_RATE:g}), each site's coefficient driven by 4 % a "
    f"step towards L0 {TARGET_L0:g}"
)


def training_run(
    shape: Shape, path: str, steps: int, precision: str = "float32", seed: int = 0
) -> Iterator[tuple[SAERegGPT2LMHeadModel, float]]:
    """Train from scratch; yields the model and CE + term after every step.

    Args:
        shape: of model, heads and batch.
        path: how the term is computed.
        steps: how many.
        precision: one of `paths.PRECISIONS`.
        seed: of the initialisation.
    """
    torch.manual_seed(seed)
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
    batches = shape.batches(shape.training_tokens).to(model.device)
    for step in tqdm(range(steps), desc=f"training, {path}", dynamic_ncols=True):
        output = run_path(path, model, optimizer, batches[step % len(batches)], precision)
        for head in model.heads:
            drive(head, output.sites[head.config.hook_name].losses.statistics.l0, TARGET_L0)
        yield model, (output.loss + output.term).item()


def drive(head: SAEHead, l0: float, target: float) -> None:
    """Raise or lower a head's sparsity coefficient by 4 %, towards a target."""
    head.config.sparsity_coefficient *= 1.04 if l0 > target else 1 / 1.04


def fitted_head(x: Tensor, d_sae: int, target_l0: float, steps: int = 100) -> SAEHead:
    """A standard head trained on given activations, whose L0 on them is the target.

    Training leaves it near the target, more or less so by its size; one shift of all biases does
    the rest, so that heads of different sizes are compared at the same L0.

    Args:
        x: (tokens, d_in), detached.
        d_sae: number of latents.
        target_l0: where its coefficient is driven to.
        steps: of up to 2,048 tokens each.
    """
    torch.manual_seed(0)
    head = make_head(SAEHeadConfig("standard", "fitted", x.shape[1], d_sae, 0.05)).to(x.device)
    optimizer = adamw(head.parameters(), HEADS_LEARNING_RATE)
    pieces = x.split(2048)
    for step in range(steps):
        losses = head.losses(pieces[step % len(pieces)])
        optimizer.zero_grad()
        (losses.reconstruction + losses.sparsity).backward()
        optimizer.step()
        drive(head, losses.statistics.l0, target_l0)
    with torch.no_grad():
        centred, active = x - head.b_dec, round(target_l0 * len(x))
        head.b_enc -= batch_threshold(centred, head.W_enc, head.b_enc, active)
    return head


def checkpoints(shape: Shape, folder: Path) -> dict[str, Path]:
    """Checkpoints by stage: those in `folder`, made there first where it has none.

    Args:
        shape: of model and heads.
        folder: created if absent.
    """
    finished = folder / "losses.json"
    if not finished.is_file():
        losses = []
        ends = {max(1, round(part * shape.training_steps)): at for at, part in STAGES.items()}
        for model, loss in training_run(shape, "auto", shape.training_steps):
            losses.append(loss)
            if stage := ends.get(len(losses)):
                model.save_pretrained(folder / stage)
        finished.write_text(json.dumps(losses))
    return {stage: folder / stage for stage in STAGES}
