"""Hooks of the site (mkdocs.yml): pages from outside of docs/, and links that leave docs/.

Files are written to be read in the repository, where a link may lead anywhere. On the site, a link to a file that has a
page leads to the page; a link to any other file becomes its path, as code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/suites.md",
}
"""Files of the repository outside of docs/, and their pages."""

_NAME = re.compile(r"<code>(?P<name>pydeq(?:\.\w+)+)(?:\([^<]*\))?</code>(?!</a>|</autoref>)")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page, and give a page that is alone in its section the room of the section's list."""
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])
    return rewrite_links(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Make code that is a name of the API, perhaps called, a link to its entry."""
    return _NAME.sub(r'<autoref identifier="\g<name>" optional>\g<0></autoref>', html)


def rewrite_links(markdown: str, page: str) -> str:
    """Rewrite links in the Markdown of a page, so that they lead to pages.

    Args:
        markdown: The text.
        page: Name of the page on the site, relative to docs/.
    """
    sources = {name: path for path, name in PAGES.items()}
    folder = (ROOT / sources.get(page, f"docs/{page}")).parent

    def rewritten(link: re.Match[str]) -> str:
        target, mark, anchor = link["target"].partition("#")
        path = Path(os.path.normpath(folder / target))
        if not target or ":" in target or not path.is_relative_to(ROOT) or not path.exists():
            return link[0]
        name = path.relative_to(ROOT).as_posix()
        on_site = PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") and path.is_file() else "")
        if on_site:
            start = os.path.dirname(page) or "."
            return f"{link['image']}[{link['text']}]({os.path.relpath(on_site, start)}{mark}{anchor})"
        text = link["text"]
        return f"`{name}`" if text.strip("`") in name else text if name in text else f"{text} (`{name}`)"

    return _LINK.sub(rewritten, markdown)
