"""COMMAND cache: list, verify and remove converted models."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.model_source import ModelSource
from ..conversion.converter import convert
from ..conversion.find_dropped import find_manifest
from ..conversion.request import Request, Target, default_jobs, make_request, model_id
from ..errors import ParoquantStreamError, StoreError
from ..maintenance.inventory import Inventory, take_inventory
from ..maintenance.models import Model
from ..maintenance.prune import PrunePlan, Rules, plan_prune, plan_removal
from ..maintenance.removal import execute
from ..maintenance.verify import verify_model, verify_store
from ..store.format import VARIANTS
from ..store.store import cache_store
from ..text import bytes_text, shown
from .cache_listing import as_json, footer, foreign_table, make_row, plan_json, plan_lines, table
from .cache_options import configure_parser
from .common import confirm, run_command

DESCRIPTION = "See what is converted, read it through, and remove it."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser("paroquant-stream cache", description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    verify_all = arguments.command == "verify" and arguments.model is None
    if verify_all and (arguments.sources or arguments.in_place):
        parser.error("--sources and --in-place need a MODEL")
    return run_command(lambda: _COMMANDS[arguments.command](arguments), "run again to resume")


def _inventory(arguments: argparse.Namespace) -> Inventory:
    return take_inventory(cache_store(arguments.cache_dir))


def _find(inventory: Inventory, names: Sequence[str]) -> list[Model]:
    """Return the models of these names. Raises StoreError for a name that none has."""
    found: dict[str, Model] = {}
    for name in names:
        path = Path(os.path.realpath(os.path.expanduser(name)))
        ids = {model_id(path, variant) for variant in VARIANTS.values()}
        same = [model for model in inventory.models if model.id in ids]
        same = same or [m for m in inventory.models if name in m.names]
        if not same:
            raise StoreError(
                f"{name}: not converted in {inventory.store.root}; `paroquant-stream cache ls` "
                "lists what is"
            )
        found |= {model.id: model for model in same}
    return list(found.values())


def _ls(arguments: argparse.Namespace) -> int:
    inventory = _inventory(arguments)
    chosen = _find(inventory, arguments.models) if arguments.models else inventory.models
    if arguments.quiet:
        for model in chosen:
            print(shown(model.name))
        return 0
    rows = [make_row(inventory, model) for model in chosen]
    if arguments.json:
        everything = as_json(inventory, rows)
        print(json.dumps([x for x in everything if x["kind"] == "model" or not arguments.models]))
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
    for model in _find(inventory, [arguments.model]):
        keys = dict.fromkeys(record.key for record in model.records)
        entries = [inventory.store.entry_path(key) for key in keys]
        for path in (*(file.path for file in model.files), *entries):
            print(shown(path))
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    inventory = _inventory(arguments)
    return _carry_out(plan_removal(inventory, _find(inventory, arguments.models)), arguments)


def _prune(arguments: argparse.Namespace) -> int:
    inventory = _inventory(arguments)
    rules = Rules(
        arguments.max_size,
        arguments.older_than,
        arguments.orphans,
        arguments.foreign,
        frozenset(model.id for model in _find(inventory, arguments.keep)),
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


def _requests_to_verify(arguments: argparse.Namespace) -> list[Request]:
    """Return a request for each variant that the model was converted to."""
    request = make_request(  # once: a Hub id is looked up on the Hub
        arguments.model, cache_dir=arguments.cache_dir, in_place=arguments.in_place
    )
    requests = [
        replace(request, target=replace(request.target, variant=v)) for v in VARIANTS.values()
    ]
    return [r for r in requests if find_manifest(r)] or requests[:1]


def _verify(arguments: argparse.Namespace) -> int:
    requests = None if arguments.model is None else _requests_to_verify(arguments)
    if requests is None:
        count, problems = verify_store(cache_store(arguments.cache_dir))
    else:
        found = [verify_model(request, arguments.sources) for request in requests]
        count, problems = sum(n for n, _ in found), [p for _, ps in found for p in ps]
    if arguments.json:
        listed = [{"path": str(p.path), "expected": p.expected, "found": p.found} for p in problems]
        print(json.dumps({"files": count, "problems": listed}))
    else:
        for problem in problems:
            print(shown(problem))
        print(f"{count} files read, {len(problems)} differ")
    damaged = {problem.key for problem in problems if problem.key}
    if damaged and _repair(arguments, requests or _requests_of(arguments, damaged)):
        problems = [problem for problem in problems if not problem.key]
    return int(bool(problems))


def _requests_of(arguments: argparse.Namespace, damaged: set[str]) -> list[Request]:
    """Return a request for each model of the cache that has one of these entries."""
    store = cache_store(arguments.cache_dir)
    return [
        Request(
            ModelSource(str(m.directory), m.directory),
            Target(store, variant=m.variant),
            jobs=default_jobs(),
        )
        for m in take_inventory(store).models
        if m.directory and damaged & {record.key for record in m.records}
    ]


def _repair(arguments: argparse.Namespace, requests: Sequence[Request]) -> bool:
    """Convert these models again, if asked to, else say how that is done."""
    say = print if not arguments.json else (lambda _: None)
    if not arguments.repair:
        for request in requests:
            say(f"to repair: {_command_of(request, arguments.cache_dir)}, or --repair")
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


def _command_of(request: Request, cache_dir: str | None) -> str:
    options = request.target.variant.options
    options += " --in-place" if request.target.in_place else ""
    options += f" --cache-dir {shlex.quote(cache_dir)}" if cache_dir else ""
    return f"paroquant-stream convert {shlex.quote(request.source.name)}{options}"


_COMMANDS = {"ls": _ls, "path": _path, "rm": _rm, "prune": _prune, "verify": _verify}
