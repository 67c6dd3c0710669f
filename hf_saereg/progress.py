"""A progress bar whose log lines can be read."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class ReadableProgress(ProgressCallback):
    """A progress bar whose log lines put the sites of one figure side by side."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line: scalars first, then each figure over all sites."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        by_figure: dict[str, list[str]] = {}
        for name, value in logs.items():
            if name == "total_flos":
                continue
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            by_figure.setdefault(name.split("/")[0], []).append(text)
        parts = [f"{name} {' '.join(values)}" for name, values in by_figure.items()]
        self.training_bar.write(f"step {state.global_step} | " + " | ".join(parts))
