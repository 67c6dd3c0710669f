"""What a study's variants are: family of the regularizer, curve, weight, FLOPs a token.

Notable:
- variants that differ only in one of splice_weight, reconstruction_weight and target_l0 are one
  curve; with a spliced loss its weight comes first; one that others join on a later curve keeps its
  own, and is a point of both
- FLOPs a token are those of `hf_saereg.flops`, every head dense: what a sparse kernel saves is not
  counted
"""

import json
from typing import Any

from hf_saereg.character import OPTION_CLASSES
from hf_saereg.corpora import character_tokenizer
from hf_saereg.flops import gpt2_flops, head_flops, step_flops
from hf_saereg.options import as_record, as_words, parse_options
from hf_saereg.study import REGULARIZED, TRAIN_SECONDS_OF, UNTRAINED, Study

KNOBS = ("splice_weight", "reconstruction_weight", "target_l0")
# what changes nothing of a model's training
BESIDE = ("fresh_", "logging_", "save_", "fidelity_", "output_dir", "seed", "run_name", "eval_")


def settings_of(study: Study) -> dict[str, dict[str, Any]]:
    """By variant: `model`, `family`, `control`, `flops_per_token`, `curve`, `knob`, `weight`.

    Beside these `targets`, the L0s that its heads are steered to, by hook name, and `also`, its
    weights on other curves, by curve.

    Raises:
        UserError: if the options of a variant cannot be used.
    """
    described = {name: _described(study, name) for name in study.variants}
    regularized = [name for name, own in described.items() if own["model"] == REGULARIZED]
    alone = set(regularized)
    for knob in KNOBS:
        groups: dict[str, list[str]] = {}
        for name in regularized:
            own = described[name]["options"]
            if knob != "splice_weight" or own[knob] > 0:
                rest = {option: value for option, value in own.items() if option != knob}
                groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(name)
        for names in groups.values():
            if len(names) > 1 and alone.intersection(names):
                _join(described, names, knob, alone)
                alone.difference_update(names)
    for own in described.values():
        del own["options"]
    return described


def _described(study: Study, variant: str) -> dict[str, Any]:
    options = dict(study.variants[variant])
    model, timed = options.pop("model", REGULARIZED), options.pop(TRAIN_SECONDS_OF, None)
    parsed = parse_options(
        *OPTION_CLASSES, arguments=["--config", str(study.base), *as_words(options)]
    )
    _arguments, heads, _term, _twin, corpus, shape, _fresh = parsed
    config = shape.config(corpus.block_size, character_tokenizer(corpus.block_size))
    language = gpt2_flops(config.to_dict())
    configs = heads.head_configs(config) if model == REGULARIZED else []
    costs = [head_flops(head.d_in, head.d_sae) for head in configs]
    record = as_record(parsed)
    own = {o: v for o, v in record.items() if not o.startswith(BESIDE)}
    control = "untrained" if model == UNTRAINED else "same time" if timed else None
    return {
        "model": model,
        "family": heads.architecture if model == REGULARIZED else "none",
        "control": control,
        "targets": {
            head.hook_name: head.target_l0 for head in configs if head.target_l0 is not None
        },
        "flops_per_token": 0 if model == UNTRAINED else sum(step_flops(language, costs, record)),
        "curve": variant,
        "knob": None,
        "weight": None,
        "also": {},
        "options": own,
    }


def _join(
    described: dict[str, dict[str, Any]], names: list[str], knob: str, alone: set[str]
) -> None:
    first = described[names[0]]
    label = f"{first['family']}, {first['options']['normalization']}"
    if first["options"]["splice_weight"]:
        label += " + spliced"
    taken = {own["curve"] for own in described.values()}
    label = label if label not in taken else f"{label}, over {knob}"
    label = label if label not in taken else f"{label} ({names[0]})"
    for name in names:
        value = described[name]["options"][knob]
        weight = value[0] if isinstance(value, list) else value
        if name in alone:
            described[name] |= {"curve": label, "knob": knob, "weight": weight}
        else:
            described[name]["also"][label] = weight
