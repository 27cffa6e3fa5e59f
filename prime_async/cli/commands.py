"""Commands in modules of their own, which are imported when they are called: to import all of them takes seconds."""

from __future__ import annotations

import ast
from importlib.resources import files

from cyclopts import App


def add_commands(app: App, paths: dict[str, str]) -> None:
    """Give ``app`` a command for each name: the function at ``module:function``, a module of this package.

    What the list of commands says of it is read from its source.
    """
    for name, path in paths.items():
        app.command(f"{__package__}.{path}", name=name, help=_docstring(path))


def _docstring(path: str) -> str | None:
    module, function = path.split(":")
    source = (files(__package__) / f"{module}.py").read_text(encoding="utf-8")
    found = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function)
    return ast.get_docstring(next(found))
