"""The page that people open: one HTML file, its figures inside it, no script and no network.

What is notable:

- Each figure is inlined four times, for light and dark, page and phone; `<picture>` picks.
- The page forbids itself every outside resource (Content-Security-Policy), so it works from disk
  and a hostile string in the results could load nothing even if it were not escaped.
- matplotlib and jinja2 are imported when a report is written, not before.
"""

import base64
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hf_saereg.report import findings
from hf_saereg.report.results import COTRAINED, FRESH, Results, SAEResult, read_results
from hf_saereg.report.verdict import Curve, compound_curve, site_curve

FIGURE_TITLES = {
    "compound": "Compound CE increase against Σ\N{NO-BREAK SPACE}L0",
    "sites": "CE increase against L0, site by site",
    "ce": "CE on training and validation text",
    "norms": "Mean norm of the residual stream",
}
PHASES = {
    "train_plain": "Training the plain model",
    "train_regularized": "Training the regularized model",
    "fresh_plain": "Fresh SAEs on the plain model",
    "fresh_regularized": "Fresh SAEs on the regularized model",
    "fidelity": "Measuring CE increase, L0 and FVU",
}


class Picture(NamedTuple):
    """One figure, ready for the page.

    Attributes:
        name: of its PNG file.
        title: its caption.
        reading: what it shows, in one line.
        description: its alternative text.
        sources: data URI by appearance: `light`, `dark`, `light_phone`, `dark_phone`.
    """

    name: str
    title: str
    reading: str
    description: str
    sources: dict[str, str]


class CotrainedHead(NamedTuple):
    """A head of the regularizer.

    Attributes:
        head: what was measured of it.
        fresh: CE increase of a fresh SAE at the same L0; None where none reached it.
    """

    head: SAEResult
    fresh: float | None


def write_report(results: Mapping[str, object], output_dir: Path) -> Path:
    """Write `index.html` and `figures/*.png`.

    Args:
        results: what `json.load` returned for `results.json`.
        output_dir: folder to write to; made if it is missing.

    Returns:
        The path of `index.html`.

    Raises:
        ReportError: if a key of the results is missing or holds what it must not.
        ImportError: if matplotlib or jinja2 is not installed.
    """
    checked = read_results(results)
    _require_extra()
    found = findings.find(checked)
    folder = Path(output_dir)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    pictures = _draw(checked, found, folder / "figures")
    page = folder / "index.html"
    page.write_text(render_page(checked, found, pictures), encoding="utf-8")
    return page


def render_page(results: Results, found: findings.Findings, pictures: Mapping[str, Picture]) -> str:
    """Lay out the page.

    Args:
        results: the numbers.
        found: what they say.
        pictures: figures by name; a section goes without one that is absent.

    Returns:
        The HTML.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        signed=findings.signed,
        l0=findings.l0_text,
        count=lambda number: f"{number:,}",
        label=lambda sparsity: f"{sparsity:g}" if isinstance(sparsity, float) else sparsity,
        percent=lambda share: f"{share:.0%}".replace("%", "\N{NO-BREAK SPACE}%"),
        duration=_duration,
    )
    heads = results.cotrained_compound()
    return environment.get_template("index.html.j2").render(
        results=results,
        setup=results.setup,
        plain=results.models.plain,
        regularized=results.models.regularized,
        found=found,
        pictures=pictures,
        phases={PHASES.get(key, key.replace("_", " ")): s for key, s in results.seconds.items()},
        cotrained=_cotrained(results),
        cotrained_compound=heads,
        fresh_compound=heads
        and _fresh(compound_curve(results, heads.model, heads.family), heads.sum_l0),
        dead_saes=sum(row.l0 == 0 for row in results.rows if row.source == FRESH),
        tally_text=findings.tally_text,
        change=findings.change,
        ce_change=findings.ce_change,
    )


def _require_extra() -> None:
    for name in ("matplotlib", "jinja2"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"The report needs {name}: run `pip install 'hf-saereg[report]'`."
            ) from error


def _draw(results: Results, found: findings.Findings, folder: Path) -> dict[str, Picture]:
    from hf_saereg.report.figures import DARK, DRAWINGS, LIGHT, Style, render

    styles = {
        "light": Style(LIGHT),
        "dark": Style(DARK),
        "light_phone": Style(LIGHT, phone=True),
        "dark_phone": Style(DARK, phone=True),
    }
    pictures = {}
    for name, draw in DRAWINGS.items():
        (folder / f"{name}.png").write_bytes(render(draw, results, Style(), "png"))
        sources = {
            appearance: _data_uri(render(draw, results, style, "svg"))
            for appearance, style in styles.items()
        }
        pictures[name] = Picture(
            name, FIGURE_TITLES[name], found.readings[name], found.descriptions[name], sources
        )
    return pictures


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _cotrained(results: Results) -> list[CotrainedHead]:
    """List the co-trained heads, each beside a fresh SAE of its family on the same model."""
    heads = [row for row in results.rows if row.source == COTRAINED]
    return [
        CotrainedHead(
            head, _fresh(site_curve(results, head.model, head.family, head.site), head.l0)
        )
        for head in heads
    ]


def _fresh(curve: Curve, l0: float) -> float | None:
    return curve.at(l0).ce_increase if curve.reaches(l0) else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
