"""What a training left in its folder that a page shows: norms over its steps, and its shape's cost.

What is notable:

- All of it is optional: a page of `results.json` alone goes without.
- FLOPs are counted on paper, as `hf_saereg.flops` says, by the options in the run's `run.json`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_saereg.flops import gpt2_flops, head_flops, step_flops
from hf_saereg.report.results import MODELS, Pair, Results

STATE_FILE, CONFIG_FILE, RUN_FILE = "trainer_state.json", "config.json", "run.json"


class NormCurve(NamedTuple):
    """Mean norm at one site during a training.

    Attributes:
        steps: at which it was logged.
        norms: ‖x‖₂, mean of the tokens since the log before; of a plain model, of the logged
            step's alone.
    """

    steps: list[int]
    norms: list[float]


class Flops(NamedTuple):
    """Floating-point operations of a training step, a token of its text.

    Attributes:
        language: forward and backward passes of the language model.
        heads_dense: of the heads that a step trains, every product over all latents.
        heads_sparse: likewise, past the encoder over active latents alone.
    """

    language: float
    heads_dense: float
    heads_sparse: float


class Training(NamedTuple):
    """One model's.

    Attributes:
        norms: by site; empty where none was logged.
        flops: None where the model's shape is not at hand, or what its heads were trained on.
    """

    norms: dict[str, NormCurve]
    flops: Flops | None


def read_trainings(run: Path, results: Results) -> Pair[Training]:
    """Of both models of a comparison.

    Args:
        run: its folder.
        results: for the L0 of co-trained heads, and the length of the context.
    """
    trainings = []
    for model in MODELS:
        folder = run / model
        log = _json(folder / STATE_FILE).get("log_history", [])
        config = _json(folder / CONFIG_FILE)
        heads = {
            path.parent.name: _json(path) for path in sorted((folder / "saes").glob("*/cfg.json"))
        }
        options = _json(run / RUN_FILE).get("options")
        is_known = config and (options is not None or not heads)
        flops = _flops(config, heads, options or {}, results) if is_known else None
        trainings.append(Training(_norms(log, results.sites), flops))
    return Pair(*trainings)


def _flops(
    config: Mapping[str, Any],
    heads: Mapping[str, Any],
    options: Mapping[str, Any],
    results: Results,
) -> Flops:
    shapes = [
        (cfg["d_in"], cfg["d_sae"], results.cotrained_l0(site) or 0.0)
        for site, cfg in heads.items()
    ]
    language = gpt2_flops(config)
    dense = step_flops(language, [head_flops(d_in, d_sae) for d_in, d_sae, _ in shapes], options)
    sparse = step_flops(language, [head_flops(*shape) for shape in shapes], options)
    return Flops(dense.language, dense.heads, sparse.heads)


def _norms(log: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> dict[str, NormCurve]:
    found = {}
    for site in sites:
        logged = [entry for entry in log if f"x_norm/{site}" in entry]
        if logged:
            norms = [entry[f"x_norm/{site}"] for entry in logged]
            found[site] = NormCurve([entry["step"] for entry in logged], norms)
    return found


def _json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
