"""Log lines that can be read, with a progress bar or without."""

from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def readable_line(step: int, logs: dict[str, Any]) -> str:
    """Scalars first, then each figure over all sites.

    Args:
        step: of the optimizer.
        logs: figures by name, or by `NAME/HOOK_NAME`.
    """
    by_figure: dict[str, list[str]] = {}
    for name, value in logs.items():
        if name == "total_flos":
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        by_figure.setdefault(name.split("/")[0], []).append(text)
    parts = [f"{name} {' '.join(values)}" for name, values in by_figure.items()]
    return f"step {step} | " + " | ".join(parts)


class ReadablePrinter(PrinterCallback):
    """Log lines alone, for `disable_tqdm`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print one line."""
        if state.is_local_process_zero and logs:
            print(readable_line(state.global_step, logs))


class ReadableProgress(ProgressCallback):
    """A progress bar, and log lines beside it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(readable_line(state.global_step, logs))
