"""The figures as TensorBoard images, beside the curves of a training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_saereg.report.canvas import PNG_DPI, Style, settings

T = TypeVar("T")

EVENTS = "events.out.tfevents.*"


class Drawn(NamedTuple, Generic[T]):
    """A figure to be.

    Attributes:
        draw: makes it.
        shown: from this.
    """

    draw: Callable[[T, Style], Figure]
    shown: T


def write_events(figures: Mapping[str, Drawn], folder: Path) -> None:
    """Write every figure as an image `report/NAME`, in place of those of an earlier report.

    Args:
        figures: by name.
        folder: for the event file, and for nothing else.
    """
    from torch.utils.tensorboard import SummaryWriter

    for earlier in folder.glob(EVENTS):
        earlier.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, (draw, shown) in figures.items():
            writer.add_image(f"report/{name}", _pixels(draw, shown), dataformats="HWC")


def _pixels(draw: Callable[[T, Style], Figure], shown: T) -> np.ndarray:
    """(height, width, 3) bytes."""
    style = Style()
    figure = draw(shown, style)
    figure.set_dpi(PNG_DPI)
    with settings(style):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
