"""An extension of griffe (mkdocs.yml): roles in docstrings, such as :class:`pydeq.DEQ`, become links of the site."""

from __future__ import annotations

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
    first, dot, rest = name.partition(".")
    try:
        path = name if first == parent.package.name else parent.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
