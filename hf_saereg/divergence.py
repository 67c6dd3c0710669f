"""KL between two predictions of the next token, in memory that does not grow with the batch.

Beside the logits themselves and, in the backward pass, their gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

ROWS_AT_ONCE = 1024


def kl_of_predictions(
    reference: Tensor, logits: Tensor, labels: Tensor, number: Tensor | int | None = None
) -> Tensor:
    """KL(reference ‖ model), () in nats: a mean over predicted tokens, or their sum / `number`.

    In single precision at least, whatever the precision of the logits.

    Args:
        reference: (batch, sequence, vocabulary) logits, taken as a constant.
        logits: (batch, sequence, vocabulary), of the model.
        labels: (batch, sequence), -100 where there is nothing to predict; shifted inside.
        number: what to divide by, where the batch is part of a larger one.
    """
    predicted = torch.zeros_like(labels, dtype=torch.bool)  # (batch, sequence)
    predicted[:, :-1] = labels[:, 1:] != -100
    rows = (reference.detach().flatten(0, 1), logits.flatten(0, 1), predicted.flatten())
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for p, q, mask in zip(*(part.split(ROWS_AT_ONCE) for part in rows), strict=True):
        # what is (rows, vocabulary) is computed again in the backward pass, a few rows at a time
        total = total + checkpoint(_summed_kl, p, q, mask, use_reentrant=False)
    return total / (predicted.sum() if number is None else number)


def _summed_kl(reference: Tensor, logits: Tensor, predicted: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = (part[predicted].to(dtype).log_softmax(-1) for part in (reference, logits))
    return kl_div(log_q, log_p, log_target=True, reduction="sum")
