"""What every page must be: whole, described, self-contained, and shown by a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
RENDERINGS = 4  # of a figure: light and dark, page and phone
PROBE = """<script>addEventListener("load", async () => {
  const addresses = [...document.querySelectorAll("picture source")].map((own) => own.srcset)
    .concat([...document.images].map((image) => image.getAttribute("src")));
  const widths = await Promise.all(addresses.map((address) => new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve(image.naturalWidth);
    image.onerror = () => resolve(0);
    image.src = address;
  })));
  document.title = "widths " + widths + " overflow " +
    (document.documentElement.scrollWidth - document.documentElement.clientWidth);
});</script>"""


class Elements(HTMLParser):
    """Collect elements, and fail where tags do not nest."""

    VOID = frozenset({"meta", "link", "img", "source", "br", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.elements = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def elements_of(page):
    """Tag and attributes of every element."""
    parser = Elements()
    parser.feed(page.read_text("utf-8"))
    parser.close()
    assert not parser.open
    return parser.elements


def assert_self_contained(page, elements):
    anchors = {attributes["id"] for _, attributes in elements if "id" in attributes}
    for tag, attributes in elements:
        assert tag not in {"script", "iframe", "object", "embed"}
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
        target = attributes.get("href", "#main")
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            file = target.partition("#")[0]
            assert target.startswith("data:") or (page.parent / file).is_file(), target
    assert "url(" not in page.read_text("utf-8").partition("</style>")[0]


def assert_images_described(elements, number):
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert len(images) == number
    assert all(len(attributes["alt"]) > 40 for attributes in images)


def assert_headings_nest(elements):
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper - level <= 1 for level, deeper in pairwise(levels))


def assert_in_tensorboard(page, figures):
    """Beside the page, every figure and nothing else as an image."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(page.parent / "tensorboard")).Reload()
    assert sorted(events.Tags()["images"]) == sorted(f"report/{name}" for name in figures)
    for name in figures:
        (image,) = events.Images(f"report/{name}")
        assert image.width > 100 and image.height > 100


def assert_shown(page, tmp_path, images):
    """No console error, every rendering loads, nothing overflows to the right of a phone."""

    def load(path):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += ["--enable-logging=stderr", "--window-size=500,900"]
        command += ["--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}"]
        run = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True
        )
        assert "CONSOLE" not in run.stderr
        return run.stdout

    load(page)
    # The page itself forbids scripts, so the probe goes into a copy without that rule.
    html = re.sub(r"<meta http-equiv[^>]+>", PROBE, page.read_text("utf-8"))
    probed = tmp_path / "probed.html"
    probed.write_text(html, encoding="utf-8")
    widths, overflow = re.search(r"<title>widths (\S*) overflow (\d+)", load(probed)).groups()
    shown = widths.split(",") if widths else []
    assert len(shown) == RENDERINGS * images
    assert all(int(width) > 0 for width in shown)
    assert overflow == "0"
