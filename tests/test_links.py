"""Links between the pages of this repository."""

import re

import pytest
from launching import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in (".", "benchmarks", "model_cards", "recipes")
    for path in (REPOSITORY / folder).glob("*.md")
)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_here(page):
    links = re.findall(r"\]\(([^)#:\s]+)\)", (REPOSITORY / page).read_text(encoding="utf-8"))
    missing = [link for link in links if not ((REPOSITORY / page).parent / link).exists()]
    assert not missing


def test_the_pages_are_looked_at():
    assert {"README.md", "CONTRIBUTING.md", "recipes/tour.md", "benchmarks/scale.md"} <= set(PAGES)
