"""COMMAND cache: list, verify and remove converted models."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.config import CONFIG_NAME
from ..conversion.converter import convert
from ..conversion.find_dropped import find_manifest
from ..conversion.request import Request, make_request
from ..errors import ParoquantStreamError, StoreError
from ..maintenance.inventory import Inventory, take_inventory
from ..maintenance.models import Model
from ..maintenance.places import Found, find_everywhere, find_to_remove, request_of
from ..maintenance.prune import PrunePlan, Rules, plan_prune, plan_removal
from ..maintenance.removal import execute
from ..maintenance.verify import verify_found, verify_model, verify_store
from ..store.format import DTYPES
from ..store.location import IN_PLACE
from ..store.store import cache_store
from ..text import bytes_text, counted, shown
from .cache_listing import as_json, footer, foreign_table, make_row, plan_json, plan_lines, table
from .cache_options import configure_parser
from .common import Parser, confirm, run_command, typed

Find = Callable[[Inventory, str], list[Found]]
DESCRIPTION = "See what is converted, read it through, and remove it."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(typed("cache"), description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    verify_all = arguments.command == "verify" and arguments.model is None
    if verify_all and (arguments.sources or arguments.in_place):
        parser.error("--sources and --in-place need a MODEL")
    return run_command(lambda: _COMMANDS[arguments.command](arguments), "run again to resume")


def _inventory(arguments: argparse.Namespace) -> Inventory:
    """List the cache. Raises StoreError for a directory named by --cache-dir that is none."""
    inventory = take_inventory(cache_store(arguments.cache_dir))
    store = inventory.store
    if arguments.cache_dir and not (os.path.isdir(store.root / "v1") or inventory.foreign):
        raise StoreError(f"{store.root}: there is no cache here; see --cache-dir")
    return inventory


def _find(inventory: Inventory, names: Sequence[str], find: Find = find_everywhere) -> list[Found]:
    """Return the conversions of these names, each once. Raises StoreError if a name has none."""
    found = [pair for name in names for pair in find(inventory, name)]
    return list({(place.store.root, model.id): (place, model) for place, model in found}.values())


def _ls(arguments: argparse.Namespace) -> int:
    inventory = _inventory(arguments)
    everything = [(inventory, model) for model in inventory.models]
    chosen = _find(inventory, arguments.models) if arguments.models else everything
    if arguments.quiet:
        for _, model in chosen:
            print(shown(model.name))
        return 0
    rows = [make_row(place, model) for place, model in chosen]
    if arguments.json:
        listed = as_json(inventory, rows)
        print(json.dumps([x for x in listed if x["kind"] == "model" or not arguments.models]))
        return 0
    lines = table(inventory, rows, arguments.verbose or bool(arguments.models)) if rows else []
    if not arguments.models:
        lines += [*foreign_table(inventory), *footer(inventory)]
    print("\n".join(lines).lstrip("\n"))
    return 0


def _path(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        print(shown(cache_store(arguments.cache_dir).root))
        return 0
    inventory = _inventory(arguments)
    for place, model in _find(inventory, [arguments.model]):
        keys = dict.fromkeys(record.key for record in model.records)
        entries = [place.store.entry_path(key) for key in keys]
        for path in (*(file.path for file in model.files), *entries):
            print(shown(path))
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    places: dict[Path, tuple[Inventory, list[Model]]] = {}
    for place, model in _find(_inventory(arguments), arguments.models, find_to_remove):
        places.setdefault(place.store.root, (place, []))[1].append(model)
    plans = [plan_removal(place, models) for place, models in places.values()]
    return max(_carry_out(plan, arguments) for plan in plans)


def _prune(arguments: argparse.Namespace) -> int:
    inventory = _inventory(arguments)
    rules = Rules(
        arguments.max_size,
        arguments.older_than,
        arguments.orphans,
        arguments.foreign,
        frozenset(model.id for _, model in _find(inventory, arguments.keep)),
    )
    return _carry_out(plan_prune(inventory, rules), arguments)


def _carry_out(plan: PrunePlan, arguments: argparse.Namespace) -> int:
    """Show the plan, ask, and remove. Raises StoreError without a yes."""
    if not arguments.json:
        size = bytes_text(plan.freed)
        head = f"to remove, {size}:" if not plan.is_empty else "nothing to remove"
        print("\n".join([head, *plan_lines(plan)]), flush=True)
    freed = 0
    if not (plan.is_empty or arguments.dry_run):
        if not arguments.yes:
            confirm("remove?", StoreError("nothing removed"))
        started = time.monotonic()
        freed = execute(plan)
        if not arguments.json:
            print(f"removed, {bytes_text(freed)} freed in {time.monotonic() - started:.1f} s")
    if arguments.json:
        print(json.dumps(plan_json(plan, arguments.dry_run)))
    return 0


def _to_verify(arguments: argparse.Namespace) -> list[Found]:
    """Return the conversions of the model, to each dtype, that are to be verified."""
    found = _find(_inventory(arguments), [arguments.model])
    if arguments.in_place:
        found = [(place, model) for place, model in found if not place.store.private]
    if not found:
        raise StoreError(f"{arguments.model}: no conversion lies in its {IN_PLACE}")
    return found


def _moved(arguments: argparse.Namespace) -> list[Request]:
    """Return requests for a model whose directory was moved, which its drop record tells."""
    if not os.path.exists(Path(arguments.model or "/dev/null").expanduser() / CONFIG_NAME):
        return []
    request = make_request(
        arguments.model, cache_dir=arguments.cache_dir, in_place=arguments.in_place
    )
    requests = [replace(request, target=replace(request.target, dtype=d)) for d in DTYPES]
    return [r for r in requests if find_manifest(r)]


def _verify(arguments: argparse.Namespace) -> int:
    found: list[Found] = []
    moved: list[Request] = []
    if arguments.model is None:
        inventory = _inventory(arguments)
        found = [(inventory, model) for model in inventory.models]
        results = [verify_store(inventory.store)]
    else:
        try:
            found = _to_verify(arguments)
        except StoreError:
            moved = _moved(arguments)
            if not moved:
                raise
        results = [verify_found(place.store, model, arguments.sources) for place, model in found]
        results += [verify_model(request, arguments.sources) for request in moved]
    count, problems = sum(n for n, _ in results), [p for _, ps in results for p in ps]
    if arguments.json:
        listed = [{"path": str(p.path), "expected": p.expected, "found": p.found} for p in problems]
        print(json.dumps({"files": count, "problems": listed}))
    else:
        for problem in problems:
            print(shown(problem))
        print(f"{counted(count, 'file')} read, {len(problems)} differ")
    damaged = {problem.key for problem in problems if problem.key}
    if damaged and _repair(arguments, moved or _requests_of(found, damaged)):
        problems = [problem for problem in problems if not problem.key]
    return int(bool(problems))


def _requests_of(found: Sequence[Found], damaged: set[str]) -> list[Request]:
    """Return a request for each of these models that has one of these entries."""
    return [
        request_of(place, model)
        for place, model in found
        if model.directory and damaged & {record.key for record in model.records}
    ]


def _repair(arguments: argparse.Namespace, requests: Sequence[Request]) -> bool:
    """Convert these models again, if asked to, else say how that is done."""
    say = print if not arguments.json else (lambda _: None)
    if not arguments.repair:
        for request in requests:
            say(f"to repair: {_command_of(request)}, or --repair")
        return False
    failed: dict[str, ParoquantStreamError] = {}
    for request in requests:
        try:
            convert(request)
            say(shown(f"{request.source.name}: converted again"))
        except ParoquantStreamError as error:
            failed[request.source.name] = error
    if failed:
        from ..conversion.batch import some_failed  # brings threads

        raise some_failed(failed, len(requests))
    return True


def _command_of(request: Request) -> str:
    dtype = request.target.dtype
    options = "" if dtype == "source" else f" --dtype {dtype}"
    options += " --in-place" if request.target.in_place else ""
    return f"{typed('convert')} {shlex.quote(request.source.name)}{options}"


_COMMANDS = {"ls": _ls, "path": _path, "rm": _rm, "prune": _prune, "verify": _verify}
