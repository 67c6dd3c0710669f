"""The page of a head's features, or of two heads' side by side: one file, no script, no network.

What is notable:

- Tokens are highlighted by how strongly the latent fires on them, in tenths of its largest
  activation; what cannot be seen, such as a line break, is shown by a sign.
- With two heads features stand side by side as `feature_matches` pairs them; those of the second
  head that are nobody's match follow at the end.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hf_saereg.feature_matches import Match
from hf_saereg.features import Context, Feature
from hf_saereg.report.layout import render_template, require_extra

LEVELS = 9
SIGNS = str.maketrans(
    {chr(code): f"\\x{code:02x}" for code in (*range(32), 127)} | {"\n": "↵", "\t": "⇥"}
)


class Run(NamedTuple):
    """Neighbouring tokens that are shown alike.

    Attributes:
        text: with signs for what cannot be seen.
        level: of the highlight, 0 for none.
        activation: of the latent; 0 where there is no highlight.
    """

    text: str
    level: int
    activation: float


class Shown(NamedTuple):
    """One head on the page.

    Attributes:
        label: of its model.
        hook_name: its site.
        head: in words.
        tokens: on how many it was read.
        features: those shown, in order.
        dead: how many latents never fired.
        left_out: how many that fired are not shown.
        tokenizer: of the model.
        belongs: whether the head is known to have been trained on the model.
    """

    label: str
    hook_name: str
    head: str
    tokens: int
    features: list[Feature]
    dead: int
    left_out: int
    tokenizer: PreTrainedTokenizerBase
    belongs: bool = True

    def runs(self, context: Context, largest: float) -> list[Run]:
        """A context as runs of equal highlight; every highlighted token is one of its own."""
        tokens = [
            Run(self.text(token), _level(activation, largest), activation)
            for token, activation in zip(context.tokens, context.activations, strict=True)
        ]
        merged: list[Run] = []
        for is_plain, group in groupby(tokens, key=lambda run: run.level == 0):
            own = list(group)
            merged += [Run("".join(run.text for run in own), 0, 0.0)] if is_plain else own
        return merged

    def text(self, token: int) -> str:
        """A token as it is shown."""
        return self.tokenizer.decode([token]).translate(SIGNS)


def write_feature_page(
    heads: Sequence[Shown],
    matches: Sequence[Match],
    text: str,
    command: str,
    output_dir: Path,
    chance: float | None = None,
) -> Path:
    """Write `index.html`.

    Args:
        heads: one, or two side by side.
        matches: their features, in the order of the page.
        text: where the tokens come from, for the reader.
        command: that made the page.
        output_dir: folder to write to; made if it is missing.
        chance: median cosine of random directions, where cosines matched the features.

    Raises:
        UserError: if jinja2 is not installed.
    """
    require_extra("jinja2")
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "index.html"
    paired = [match for match in matches if match.first is not None and match.second is not None]
    cosines = [match.cosine for match in paired if match.cosine is not None]
    html = render_template(
        "features.html.j2",
        heads=heads,
        matches=matches,
        features=[{feature.index: feature for feature in head.features} for head in heads],
        correlation=median(match.correlation for match in paired) if paired else None,
        cosine=median(cosines) if cosines else None,
        chance=chance,
        alone=[
            sum(match.second is None for match in matches),
            sum(match.first is None for match in matches),
        ],
        text=text,
        command=command,
        levels=LEVELS,
    )
    path.write_text(html, encoding="utf-8")
    return path


def _level(activation: float, largest: float) -> int:
    if activation <= 0 or largest <= 0:
        return 0
    return max(1, min(LEVELS, round(LEVELS * activation / largest)))
