"""Weights of a whole model into one whose parameters are shared out among processes."""

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor


def load_full_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all weights and buffers; each process takes its part of those that are sharded.

    Args:
        model: sharded by `fully_shard`, or not.
        state: of the whole model, the same on every process.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)
