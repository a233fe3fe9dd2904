"""The pages of the documentation, and the commands and links in them."""

import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/**/*.md"))]
_BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(page: pathlib.Path) -> Iterator[str]:
    """The shell commands of a page; lines joined by a backslash are one command."""
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = block.replace("\\\n", " ").splitlines()
        yield from (line.strip() for line in lines if line.strip() and not line.startswith("#"))


def local_links(page: pathlib.Path) -> Iterator[str]:
    """The links of a page within the project, as written."""
    yield from (target for target in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target)


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
