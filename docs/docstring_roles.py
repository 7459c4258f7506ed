"""An extension of griffe (mkdocs.yml): roles in docstrings, such as :class:`pydeq.DEQ`, become links of the site."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<name>[\w.]+)`")


class Roles(griffe.Extension):
    """Turns each role into a link to the entry of its object, or into code if it has no entry."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._rewrite(pkg)

    def _rewrite(self, parent: griffe.Object) -> None:
        if parent.docstring:
            parent.docstring.value = _ROLE.sub(lambda role: _link(parent, role["name"]), parent.docstring.value)
        for member in parent.members.values():
            if isinstance(member, griffe.Object):
                self._rewrite(member)


def _link(parent: griffe.Object, name: str) -> str:
    try:
        path = parent.resolve(name)
    except griffe.NameResolutionError:  # a full name
        path = name
    last = path.rpartition(".")[2]
    with contextlib.suppress(griffe.AliasResolutionError, KeyError):
        target = parent.modules_collection[path]
        if target.is_module and last in target.members:  # a function has the name of its module
            path = f"{path}.{last}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
