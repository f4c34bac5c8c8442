"""COMMAND cache: list, verify and remove converted models."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from typing import TYPE_CHECKING

from ..api.cache import RemovalPlan, plan_prune, plan_removal
from ..conversion.request import Request
from ..errors import StoreError
from ..maintenance.inventory import Inventory, take_inventory
from ..maintenance.listing import make_row, select
from ..maintenance.places import find_all
from ..store.store import cache_store
from ..text import bytes_text, counted, shown
from .arguments import Parser, typed
from .cache_listing import (
    as_json,
    footer,
    foreign_table,
    plan_json,
    plan_lines,
    size_json,
    size_lines,
    table,
    terminal_width,
)
from .cache_options import configure_parser
from .common import confirm, run_command

if TYPE_CHECKING:
    from ..api.verification import Verification

DESCRIPTION = "See what is converted, read it through, and remove it."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(typed("cache"), description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    verify_all = arguments.command == "verify" and arguments.model is None
    if verify_all and (arguments.sources or arguments.in_place):
        parser.error("--sources and --in-place need a MODEL")
    return run_command(lambda: _run(arguments), "run again to resume")


def _run(arguments: argparse.Namespace) -> int:
    root = cache_store(arguments.cache_dir).root
    if arguments.cache_dir and not os.path.isdir(root / "v1") and not _inventory(arguments).foreign:
        raise StoreError(f"{root}: there is no cache here; see --cache-dir")
    return _COMMANDS[arguments.command](arguments)


def _inventory(arguments: argparse.Namespace) -> Inventory:
    return take_inventory(cache_store(arguments.cache_dir))


def _ls(arguments: argparse.Namespace) -> int:
    inventory = _inventory(arguments)
    everything = [(inventory, model) for model in inventory.models]
    chosen = find_all(inventory, arguments.models) if arguments.models else everything
    found = [make_row(place, model) for place, model in chosen]
    rows = select(found, arguments.filter, arguments.sort)
    part = bool(arguments.models or arguments.filter)
    if arguments.quiet:
        for row in rows:
            print(shown(row.model.name))
    elif arguments.json:
        listed = as_json(inventory, rows)
        print(json.dumps([x for x in listed if x["kind"] == "model" or not part]))
    else:
        width = terminal_width()
        verbose = arguments.verbose or bool(arguments.models)
        lines = table(rows, verbose, width) if rows else []
        if arguments.filter:
            lines += ["", f"{len(rows)} of {len(found)} models shown"]
        elif not part:
            lines += [*foreign_table(inventory, width), *footer(inventory)]
        print("\n".join(lines).lstrip("\n"))
    return 0


def _size(arguments: argparse.Namespace) -> int:
    sizes = size_json(_inventory(arguments))
    print(json.dumps(sizes) if arguments.json else "\n".join(size_lines(sizes)))
    return 0


def _path(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        print(shown(cache_store(arguments.cache_dir).root))
        return 0
    inventory = _inventory(arguments)
    for place, model in find_all(inventory, [arguments.model]):
        keys = dict.fromkeys(record.key for record in model.records)
        entries = [place.store.entry_path(key) for key in keys]
        for path in (*(file.path for file in model.files), *entries):
            print(shown(path))
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    return _carry_out(plan_removal(*arguments.models, cache_dir=arguments.cache_dir), arguments)


def _prune(arguments: argparse.Namespace) -> int:
    plan = plan_prune(
        max_size=arguments.max_size,
        older_than=arguments.older_than,
        orphans=arguments.orphans,
        foreign=arguments.foreign,
        keep=arguments.keep,
        cache_dir=arguments.cache_dir,
    )
    return _carry_out(plan, arguments)


def _carry_out(plan: RemovalPlan, arguments: argparse.Namespace) -> int:
    """Show the plan, ask, and remove. Raises StoreError without a yes."""
    if not arguments.json:
        size = bytes_text(plan.size)
        head = f"to remove, {size}:" if not plan.is_empty else "nothing to remove"
        print(
            "\n".join([head, *(line for part in plan.details for line in plan_lines(part))]),
            flush=True,
        )
    freed = 0
    if not (plan.is_empty or arguments.dry_run):
        if not arguments.yes:
            confirm("remove?", StoreError("nothing removed"))
        started = time.monotonic()
        freed = plan.execute()
        if not arguments.json:
            print(f"removed, {bytes_text(freed)} freed in {time.monotonic() - started:.1f} s")
    if arguments.json:
        for part in plan.details:
            print(json.dumps(plan_json(part, arguments.dry_run)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    where = {"cache_dir": arguments.cache_dir, "in_place": arguments.in_place}
    from ..api.verification import verify_cache  # for this command alone

    found = verify_cache(arguments.model, sources=arguments.sources, **where)
    problems = found.problems
    if arguments.json:
        listed = [{"path": str(p.path), "expected": p.expected, "found": p.found} for p in problems]
        print(json.dumps({"files": found.files, "problems": listed}))
    else:
        for problem in problems:
            print(shown(problem))
        print(f"{counted(found.files, 'file')} read, {len(problems)} differ")
    repaired = bool(found.damaged) and _repair(found, arguments)
    return int(len(problems) > (len(found.damaged) if repaired else 0))


def _repair(found: Verification, arguments: argparse.Namespace) -> bool:
    """Convert these models again, if asked to, else say how that is done."""
    say = print if not arguments.json else (lambda _: None)
    if arguments.repair:
        found.repair(lambda name: say(shown(f"{name}: converted again")))
    else:
        for request in found.requests:
            say(f"to repair: {_command_of(request, arguments.cache_dir)}, or --repair")
    return bool(arguments.repair and found.requests)


def _command_of(request: Request, cache_dir: str | None) -> str:
    options = request.target.variant.options
    options += " --in-place" if request.target.in_place else ""
    options += f" --cache-dir {shlex.quote(cache_dir)}" if cache_dir else ""
    return f"{typed('convert')} {shlex.quote(request.source.name)}{options}"


_COMMANDS = {
    "ls": _ls, "size": _size, "path": _path, "rm": _rm, "prune": _prune, "verify": _verify,
}  # fmt: skip
