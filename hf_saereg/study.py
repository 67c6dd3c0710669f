"""Variants of one job, several seeds each: what a study's file says.

Notable:
- a study is a YAML file: `base` (the configuration of a recipe), `seeds`, and `variants`, each a
  mapping of options over the base; variants are compared with the first one, paired by seed
- `grid` in a variant stands for one variant a combination of its values
- `model: plain` trains the twin without heads; with `train_seconds_of: VARIANT` for as long as that
  variant's training of the same seed took; `model: untrained` takes no step at all
"""

import fnmatch
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from hf_saereg.errors import UserError, in_one_line

REGULARIZED, PLAIN, UNTRAINED = "regularized", "plain", "untrained"
MODELS = (REGULARIZED, PLAIN, UNTRAINED)
TRAIN_SECONDS_OF = "train_seconds_of"


class StudyError(UserError):
    """A study's file cannot be used; the message says why."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        path: of its file.
        base: configuration file of the job.
        seeds: of every variant.
        variants: options over the base, by name; the first is what the others are compared with.
    """

    path: Path
    base: Path
    seeds: list[int]
    variants: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a study's file; `base` is relative to it.

        Raises:
            StudyError: if it is missing, lacks one of the three keys, or a variant cannot be.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise StudyError(f"Cannot read the study {path}: {in_one_line(error)}.") from error
        if not isinstance(content, dict) or set(content) != {"base", "seeds", "variants"}:
            raise StudyError(f"{path} must have the keys base, seeds and variants, and no others.")
        if not content["variants"] or not content["seeds"]:
            raise StudyError(f"{path} has no variants or no seeds; there is nothing to run.")
        seeds = content["seeds"]
        if not isinstance(seeds, list) or len(set(map(str, seeds))) < len(seeds):
            raise StudyError(f"seeds in {path} is {seeds}; give a list of different whole numbers.")
        if not isinstance(content["variants"], dict):
            raise StudyError(f"variants in {path} must be a mapping of names to options.")
        variants: dict[str, dict[str, Any]] = {}
        for written, options in content["variants"].items():
            if options is not None and not isinstance(options, dict):
                raise StudyError(f"The variant {written!r} in {path} is no mapping of options.")
            for name, own in _expanded(str(written), options or {}):
                if name in variants:
                    raise StudyError(f"Two variants in {path} are called {name!r}; rename one.")
                variants[name] = own
        if wrong := [name for name in variants if "/" in name or name in (".", "..")]:
            raise StudyError(
                f"A variant in {path} is called {wrong[0]!r}, but its name is to be a folder's; "
                "leave out the slash."
            )
        if not isinstance(content["base"], str):
            raise StudyError(
                f"base in {path} is {content['base']!r}; name a recipe's configuration, such as "
                "character_study.yaml."
            )
        study = cls(path, path.parent / content["base"], seeds, variants)
        study._check_controls()
        return study

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def model_of(self, variant: str) -> str:
        """`regularized`, `plain` or `untrained`."""
        return self.variants[variant].get("model", REGULARIZED)

    def donors(self, variant: str) -> tuple[str, str] | None:
        """Variants whose times say how long a control trains; None for any other.

        Returns:
            The variant that it trains as long as, and the plain one whose seconds a step it takes.
        """
        timed = self.variants[variant].get(TRAIN_SECONDS_OF)
        return None if timed is None else (timed, self.baseline)

    def cells(self) -> list[tuple[str, int]]:
        """Variant and seed of every cell, one seed after the other."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def cells_of(self, patterns: list[str]) -> list[tuple[str, int]]:
        """Cells of the variants whose names match, in the order of `cells`.

        Args:
            patterns: names of variants, with `*` for any part of one.

        Raises:
            StudyError: if one matches no variant.
        """
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(variant, pattern) for variant in self.variants):
                known = ", ".join(repr(variant) for variant in self.variants)
                raise StudyError(
                    f"{self.path} has no variant {pattern!r}; it has {known} (* stands for any "
                    "part of a name)."
                )
        return [
            (variant, seed)
            for variant, seed in self.cells()
            if any(fnmatch.fnmatchcase(variant, pattern) for pattern in patterns)
        ]

    def _check_controls(self) -> None:
        if self.model_of(self.baseline) == UNTRAINED:
            raise StudyError(
                f"The first variant of {self.path}, {self.baseline!r}, is untrained, but the "
                "others are compared with it in time and CE; put a trained one first."
            )
        for variant, options in self.variants.items():
            if self.model_of(variant) not in MODELS:
                raise StudyError(
                    f"model of the variant {variant!r} is {options['model']!r}; choose one of "
                    f"{', '.join(MODELS)}."
                )
            timed = options.get(TRAIN_SECONDS_OF)
            if timed is None:
                continue
            if self.model_of(variant) != PLAIN or "max_steps" in options:
                raise StudyError(
                    f"{TRAIN_SECONDS_OF} of the variant {variant!r} sets the steps of a plain "
                    "model; say model: plain, and no max_steps."
                )
            if timed not in self.variants or TRAIN_SECONDS_OF in self.variants[timed]:
                raise StudyError(
                    f"{TRAIN_SECONDS_OF} of the variant {variant!r} is {timed!r}, which is no "
                    "variant with steps of its own; name one of this study, of a grid one point."
                )
            if self.model_of(timed) == UNTRAINED or self.model_of(self.baseline) != PLAIN:
                raise StudyError(
                    f"{TRAIN_SECONDS_OF} of the variant {variant!r} needs a trained variant, and a "
                    "first variant with model: plain, whose seconds a step are counted with."
                )


def _expanded(name: str, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The variant, or one for each combination of its grid's values."""
    if "grid" not in options:
        yield name, options
        return
    grid = options["grid"]
    good = isinstance(grid, dict) and grid
    if not good or not all(isinstance(values, list) and values for values in grid.values()):
        raise StudyError(
            f"grid of the variant {name!r} is {grid!r}; give options with a list of values each, "
            "as in {reconstruction_weight: [0.3, 1, 3, 10]}."
        )
    if twice := [option for option in grid if option in options]:
        raise StudyError(f"The variant {name!r} gives {twice[0]} twice, alone and in its grid.")
    rest = {option: value for option, value in options.items() if option != "grid"}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        yield f"{name}, {', '.join(f'{o} {v}' for o, v in point.items())}", rest | point


def shard_of(cells: list[tuple[str, int]], shard: list[int]) -> list[tuple[str, int]]:
    """Every N-th cell from the I-th on.

    Args:
        cells: of the whole study.
        shard: I and N.

    Raises:
        StudyError: unless 0 ≤ I < N.
    """
    if len(shard) != 2 or not 0 <= shard[0] < shard[1]:
        raise StudyError(f"shard is {shard}; give two numbers I N with 0 ≤ I < N.")
    return cells[shard[0] :: shard[1]]
