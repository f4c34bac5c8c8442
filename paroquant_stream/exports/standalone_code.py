"""The Python file of a self-contained export: `standalone.py`, then the modules of the rotation.

What the file holds of a kernel is the text of the module that `load` uses: there is one source of
both. Imports of this package are left out, and where two modules have one name, the module's comes
in front, as in `cuda_rotate`, `PackedTables`.
"""

from __future__ import annotations

import ast
import inspect
import io
import token
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

from ..rotation import cuda, cuda_rows, kernels, metal, packed, reference, tables
from . import standalone

_INLINED = (tables, packed, reference, metal, cuda_rows, cuda, kernels)
"""Each after those that it imports."""
_RENAMED = (packed, reference, metal, cuda)
_ALIASES = {
    reference: "reference = SimpleNamespace(Tables=ReferenceTables, rotate=reference_rotate)",
    metal: "metal = SimpleNamespace(Tables=PackedTables, usable=metal_usable, rotate=metal_rotate)",
    cuda: "cuda = SimpleNamespace(Tables=PackedTables, usable=cuda_usable, rotate=cuda_rotate)",
    kernels: "kernels = SimpleNamespace(RotationTables=RotationTables, rotate=rotate)",
}
"""What the other modules see of a module."""
_IMPORTS = [ast.ImportFrom("types", [ast.alias("SimpleNamespace")], 0)]


@dataclass(frozen=True)
class _Module:
    """A module taken apart."""

    docstring: str
    imports: list[ast.Import | ast.ImportFrom]
    """Those of other packages."""
    body: str
    names: list[str]
    """What it defines at its top."""


def model_code() -> str:
    """Return the text of a self-contained export's Python file."""
    own = _taken_apart(standalone)
    parts = {module: _taken_apart(module) for module in _INLINED}
    imports = [node for part in (own, *parts.values()) for node in part.imports]
    text = f'"""{own.docstring}"""\n\nfrom __future__ import annotations\n\n'
    text += f"{_merged([*imports, *_IMPORTS])}\n\n{own.body}"
    for module, part in parts.items():
        title = (
            f"---- paroquant_stream/rotation/{_short(module)}.py ----\n\n{part.docstring.strip()}"
        )
        lines = "\n".join(f"# {line}".rstrip() for line in title.splitlines())
        body = _renamed(part.body, _new_names(module, parts))
        text += f"\n\n{lines}\n\n{body}"
        if module in _ALIASES:
            text += f"\n\n{_ALIASES[module]}\n"
    return text


def _merged(imports: Iterable[ast.Import | ast.ImportFrom]) -> str:
    """Return import statements, one for each module that names are taken from."""
    plain, taken = set[str](), dict[str, set[str]]()
    for node in imports:
        names = {ast.unparse(alias) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            taken.setdefault(node.module or "", set()).update(names)
        else:
            plain |= {f"import {name}" for name in names}
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in taken.items()]
    return "\n".join(sorted(plain) + sorted(lines))


def _short(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _taken_apart(module: ModuleType) -> _Module:
    """Separate a module's docstring, its imports and the rest."""
    source = inspect.getsource(module)
    tree = ast.parse(source)
    imports, names, end = list[ast.Import | ast.ImportFrom](), list[str](), 0
    for node in tree.body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            end = node.end_lineno or 0
            if isinstance(node, ast.Import) or (node.level == 0 and node.module != "__future__"):
                imports.append(node)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    body = "".join(
        line for line in source.splitlines(keepends=True)[end:] if not line.startswith("__all__")
    )
    return _Module(ast.get_docstring(tree, clean=False) or "", imports, body.strip() + "\n", names)


def _new_names(module: ModuleType, parts: Mapping[ModuleType, _Module]) -> dict[str, str]:
    """Return the new name of each name in a module that another one has too."""
    if module not in _RENAMED:
        return {}
    found = {"Tables": "PackedTables"} if module in (metal, cuda) else {}
    return found | {name: _prefixed(_short(module), name) for name in parts[module].names}


def _prefixed(prefix: str, name: str) -> str:
    """Put a module's name in front of one of its names, in the spelling of that name."""
    hidden, plain = ("_", name[1:]) if name.startswith("_") else ("", name)
    if plain.isupper():
        return f"{hidden}{prefix.upper()}_{plain}"
    return hidden + (f"{prefix.title()}{plain}" if plain[0].isupper() else f"{prefix}_{plain}")


def _renamed(body: str, names: Mapping[str, str]) -> str:
    """Rename variables; attributes and strings stay."""
    lines, before = body.splitlines(keepends=True), ""
    places = list[tuple[int, int, str]]()
    for found in tokenize.generate_tokens(io.StringIO(body).readline):
        if found.type == token.NAME and found.string in names and before != ".":
            places.append((found.start[0] - 1, found.start[1], found.string))
        before = found.string
    for row, column, name in reversed(places):
        line = lines[row]
        lines[row] = line[:column] + names[name] + line[column + len(name) :]
    return "".join(lines)


def names_of(modules: Iterable[ModuleType] = (standalone, *_INLINED)) -> list[str]:
    """Return all names at the top of the file, one that is there twice twice."""
    parts = {module: _taken_apart(module) for module in modules}
    return [
        _new_names(m, parts).get(name, name) for m, part in parts.items() for name in part.names
    ]
