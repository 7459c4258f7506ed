"""The pages of the API in docs/reference have every public name, and only what exists."""

import importlib
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent / "docs" / "reference"
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
ENTRIES = re.findall(r"^::: (\S+)$", TEXT, re.MULTILINE)
NAMES = (Path(__file__).parent / "public_names.txt").read_text(encoding="utf-8").split()


def resolve(name):
    """The object of a full name; of a module and an attribute of its package with the same name, the module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry(entry):
    assert resolve(entry).__doc__
    assert ENTRIES.count(entry) == 1


def test_every_public_name_is_on_a_page():
    """As an entry, perhaps under another name, or, for what is neither a class nor a function, in the text."""
    shown = {id(resolve(entry)) for entry in ENTRIES}
    missing = []
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        if id(getattr(importlib.import_module(module), attribute)) not in shown and f"`{name}`" not in TEXT:
            missing.append(name)
    assert not missing, f"add to a page of docs/reference: {', '.join(missing)}"
