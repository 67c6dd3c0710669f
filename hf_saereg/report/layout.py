"""What every page of the reports is laid out with: pictures inside the page, filters, templates.

What is notable:

- Each figure is inlined four times, for light and dark, page and phone; `<picture>` picks.
- A page forbids itself every outside resource (Content-Security-Policy), so it works from disk and
  a hostile string in what it shows could load nothing even if it were not escaped.
- matplotlib and jinja2 are imported when a page is written, not before.
"""

import base64
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_saereg.errors import UserError
from hf_saereg.report.convergence import SETTLED
from hf_saereg.report.findings import l0_text, signed

if TYPE_CHECKING:  # it imports matplotlib
    from hf_saereg.report.events import Drawn


PAGE_MODULES = ("matplotlib", "jinja2")  # of a page with figures


class Picture(NamedTuple):
    """One figure, ready for the page.

    Attributes:
        name: of its PNG and SVG files.
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


class Caption(NamedTuple):
    """The words of a figure.

    Attributes:
        title: its caption.
        reading: what it shows, in one line.
        description: its alternative text.
    """

    title: str
    reading: str
    description: str


def require_extra(*names: str) -> None:
    """Check that what pages are written with is installed.

    Args:
        *names: modules.

    Raises:
        UserError: saying what to install.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"The report needs {name}: run `pip install 'hf-saereg[report]'`."
            ) from error


def draw_pictures(
    figures: Mapping[str, "Drawn"], captions: Mapping[str, Caption], folder: Path
) -> dict[str, Picture]:
    """Draw every figure for every appearance, and as PNG and SVG files.

    Args:
        figures: by name.
        captions: the words of each.
        folder: for the files.
    """
    from hf_saereg.report.canvas import DARK, LIGHT, Style, render

    styles = {
        "light": Style(LIGHT),
        "dark": Style(DARK),
        "light_phone": Style(LIGHT, phone=True),
        "dark_phone": Style(DARK, phone=True),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, (draw, shown) in figures.items():
        for image_format in ("png", "svg"):
            content = render(draw, shown, Style(), image_format)
            (folder / f"{name}.{image_format}").write_bytes(content)
        sources = {
            appearance: _data_uri(render(draw, shown, style, "svg", transparent=True))
            for appearance, style in styles.items()
        }
        pictures[name] = Picture(name, *captions[name], sources)
    return pictures


def percent(share: float) -> str:
    """A share as a whole percentage that does not break over a line."""
    return f"{share:.0%}".replace("%", "\N{NO-BREAK SPACE}%")


def render_template(name: str, **values: Any) -> str:
    """Fill a template of this folder; what is not there is an error, what is there is escaped.

    Args:
        name: of the template.
        **values: what it shows.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["settled"] = SETTLED
    environment.filters.update(
        signed=signed,
        l0=l0_text,
        count=lambda number: f"{number:,}",
        label=lambda value: f"{value:g}" if isinstance(value, float) else value,
        percent=percent,
        duration=_duration,
    )
    return environment.get_template(name).render(**values)


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
