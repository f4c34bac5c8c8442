"""The cache command's subcommands, options and help."""

from __future__ import annotations

import argparse

from ..maintenance.listing import parse_filter, parse_order
from ..text import parse_age, parse_size
from .arguments import add_cache_dir, add_help, option_type

MODEL = "a model directory (also one that is gone), a Hub id, or a name as `ls` shows it"
LS = """\
The converted models: layout, shards converted of all, size, when last used, and whether a load
would convert anything and why. Looks at headers, stat and remembered digests only: a shard that was
never hashed where it lies now is `unknown`, and `convert --dry-run` reads it. On a terminal lines
are cut to its width, and a narrow one lacks some columns; `| cat` shows them whole."""
FILTER = """\
list only the models for which CONDITION holds: size>1GB, age>=30d (since the last use),
model=PART (of the name), layout=NAME or state=STATE, also with < <= != and so on; quote it for the
shell. Of several all must hold"""
SORT = """\
sort by name (default), size (largest first), age (longest unused first), layout or state; KEY:asc
or KEY:desc is the other way round"""
SIZE = """\
How large the cache is and how much of that `prune` could remove, by which option; and the free
space. Counts files, reads none but manifests."""
SIZE_JSON = """\
print one JSON object of bytes: size, removable, of that useless, orphans and foreign; free; and
path, and stays (what stays and why)"""
LS_JSON = """\
print one JSON list. Of kind `model`: name, directory, manifest, layout, size, last_used (seconds
since 1970), state (fresh, stale, unknown, broken, orphan, damaged), why, shards_converted, shards
(each with shard, state, why, key, bytes_in, bytes_out, dropped). Of kind `paroquant` (directories
of its own cache): path, size, last_used. Of kind `unclaimed` and `temps`: size, files"""
PATH = "The cache's directory, or the manifest and the entries of MODEL, one path per line."
RM = """\
Remove the conversions of these models. Entries that another model uses stay. In the model
directories nothing is touched but a conversion that `convert --in-place` made: it is meant where
the cache holds none, or by its own path MODEL/mlx. Refused while a conversion is running."""
PRUNE = """\
Remove what is surely useless: temporary files of dead runs, damaged entries and manifests,
leftovers of an earlier removal, remembered digests of files that are gone. The options remove more.
A model whose source shards were dropped is never pruned."""
REMOVE_JSON = """\
print one JSON object: dry_run, models, files, foreign, stays (each with what and why), size"""
VERIFY = """\
Read every entry of MODEL, or of all models, and with --sources its shards too, and compare their
hashes with those taken when they were written. Prints `path: expected X, got Y` for each that
differs. A damaged entry is taken out of use, to be made again by the next conversion; one whose
shard was removed is kept in the cache's `damaged`. Exit code: 0 all right, 1 something differs or
failed, 2 wrong usage."""
EXAMPLES = {
    "ls": (
        "paroquant-stream cache ls --sort size",
        "paroquant-stream cache ls --filter 'age>30d' -q",
        "paroquant-stream cache ls path/to/model",
    ),
    "size": ("paroquant-stream cache size",),
    "path": ("paroquant-stream cache path owner/name",),
    "rm": (
        "paroquant-stream cache rm owner/name --dry-run",
        "paroquant-stream cache rm path/to/model -y",
    ),
    "prune": (
        "paroquant-stream cache prune --dry-run",
        "paroquant-stream cache prune --max-size 100GB",
        "paroquant-stream cache prune --older-than 30d --orphans",
    ),
    "verify": (
        "paroquant-stream cache verify",
        "paroquant-stream cache verify path/to/model --sources",
        "paroquant-stream cache verify --repair",
    ),
}


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_help(parser, [examples[-1] for examples in EXAMPLES.values()], hub=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, description=text, help=summary)
        add_help(command, EXAMPLES[name], hub=name == "verify")
        if name != "verify":
            add_cache_dir(command)
        return command

    ls = add("ls", LS, "list the converted models")
    ls.add_argument("models", nargs="*", metavar="MODEL", help=f"{MODEL} (default: all)")
    ls.add_argument("-v", "--verbose", action="store_true", help="list each shard, as with MODEL")
    ls.add_argument(
        "--filter",
        action="append",
        type=option_type(parse_filter),
        default=[],
        metavar="CONDITION",
        help=FILTER,
    )
    ls.add_argument("--sort", type=option_type(parse_order), metavar="KEY", help=SORT)
    form = ls.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=LS_JSON)
    form.add_argument(
        "-q", "--quiet", action="store_true", help="print the names only, one per line"
    )
    size = add("size", SIZE, "print how large the cache is, and what could be removed")
    size.add_argument("--json", action="store_true", help=SIZE_JSON)
    path = add("path", PATH, "print where the cache or a model lies")
    path.add_argument("model", nargs="?", metavar="MODEL", help=MODEL)
    rm = add("rm", RM, "remove models")
    rm.add_argument("models", nargs="+", metavar="MODEL", help=MODEL)
    prune = add("prune", PRUNE, "remove what is useless, old or too much")
    _add_rules(prune)
    for command in (rm, prune):
        command.add_argument(
            "--dry-run", action="store_true", help="show what would be removed, remove nothing"
        )
        command.add_argument("-y", "--yes", action="store_true", help="do not ask")
        command.add_argument("--json", action="store_true", help=REMOVE_JSON)
    _configure_verify(add("verify", VERIFY, "read every byte of the cache"))


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-size",
        type=option_type(parse_size),
        metavar="SIZE",
        help="remove the least recently used models until the cache fits into SIZE, like 100GB",
    )
    parser.add_argument(
        "--older-than",
        type=option_type(parse_age),
        metavar="AGE",
        help="remove models that were not used for AGE, like 30d (s, m, h, d, w)",
    )
    parser.add_argument(
        "--orphans",
        action="store_true",
        help="remove models whose directory is gone, and entries that no model names and that are "
        "an hour old (perhaps of an interrupted conversion, which could resume with them)",
    )
    parser.add_argument(
        "--foreign",
        action="store_true",
        help="remove the directories that paroquant's own MLX cache left under the same root",
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="MODEL", help=f"keep it: {MODEL}"
    )


def _configure_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL} (default: all models)")
    where = parser.add_mutually_exclusive_group()
    add_cache_dir(where)
    where.add_argument("--in-place", action="store_true", help="only the conversion in MODEL/mlx")
    parser.add_argument("--sources", action="store_true", help="read MODEL's shards too")
    parser.add_argument(
        "--repair", action="store_true", help="convert the models of damaged entries again"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
