"""The pages of the documentation, and the commands and links in them."""

import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/**/*.md"))]
_BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(page: pathlib.Path) -> Iterator[str]:
    """The shell lines of a page; one that a backslash continues is one."""
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = block.replace("\\\n", " ").splitlines()
        yield from (line.strip() for line in lines if line.strip() and not line.startswith("#"))


def local_links(page: pathlib.Path) -> Iterator[str]:
    """What a page links to within the project, as it is written."""
    yield from (target for target in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target)


def anchors(page: pathlib.Path) -> set[str]:
    """The names of a page's headings, as links to them are written."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
