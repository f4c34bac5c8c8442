"""Source shards that are removed once their replacement is safe, and the record that remains.

The states of a shard, each durable before the next; after any interrupt the next run resumes:

    1 source               present; its task is not done
    2 source, entry        its entry is published, with its digest beside it
    3 source, entry, record    both copies of the drop record name every finished entry and hold
                           the headers of this shard and of those removed before, all marked dropped
    4 entry, record        removed; a shard that is marked counts as dropped only while it is absent

A shard passes from 2 to 3 when no other shard can need it any more: when the tasks of its related
shards, those that lend parts to it or borrow parts from it, are done too, their entries were read
back from the disk, and the lending files were read again and hold the borrowed bytes. So a record
never lacks a related shard: if a later run finds a shard whose lender was removed, its own finished
entry is in the record, and is used as it is. Where values are cast, one of them may be out of
range, and then another dtype needs the sources: no shard is removed before all are converted.

The removal itself is `SourceFile.remove`: of the file that was hashed in this run, through the
descriptor that it was hashed through, while its name still leads to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType

from ..errors import SourceChangedError, StoreError
from ..files.folder import Folder
from ..plan.task import Task
from ..store.damage import confirmed_defect, take_out
from ..store.drop_note import read_note, write_note
from ..store.drop_record import (
    DropRecord,
    is_stored,
    new_id,
    read_records,
    record_ids,
    write_record,
)
from ..store.location import IN_PLACE
from ..store.manifest import EntryRecord, Manifest
from ..trace import NO_TRACE, Trace
from .planning import ModelPlan
from .request import Request
from .source_file import SourceFile, remove_dangling_link

logger = logging.getLogger(__name__)


class Dropper(AbstractContextManager["Dropper"]):
    """Remove the shards of a run as they become free."""

    def __init__(
        self,
        request: Request,
        model: ModelPlan,
        model_dir: Folder | None,
        manifest_of: Callable[[Sequence[EntryRecord]], Manifest],
        trace: Trace = NO_TRACE,
    ) -> None:
        """Make one for a run, which need not remove anything: `Request.drop_source` says so.

        Args:
            request: The run.
            model: The plan of the whole model, and what earlier runs removed of it.
            model_dir: The model directory that this run has locked, open, since its path may come
                to name another one. None where nothing is to be removed.
            manifest_of: Gives a manifest of some records.
            trace: Where the stages are timed.
        """
        self._request, self._manifest_of, self._trace = request, manifest_of, trace
        self._model_dir = model_dir
        self._tasks = {task.shard: task for task in model.plan.tasks}
        self._related = _related(model.plan.tasks)
        self._before = model.drop
        self._record = model.drop or DropRecord(new_id(), request.target.variant, manifest_of([]))
        self._sound: set[str] = set()
        self._proved: dict[str, SourceFile] = {}
        self._noted = False
        self.dropped = dict(model.dropped)
        self._finished = dict(self.dropped)
        for shard in self.dropped if request.options.drop_source else ():
            if model_dir is not None:
                remove_dangling_link(model_dir, shard)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files that were read and not removed."""
        while self._proved:
            self._proved.popitem()[1].close()

    def finish_task(self, record: EntryRecord) -> None:
        """Note that a task is done, and remove every shard that is free by that.

        Raises:
            EntryDamagedError: An entry is not what was written.
            SourceChangedError: A shard is not the one that was converted.
            StoreError: Something cannot be written, read or removed.
        """
        self._finished[record.shard] = record
        if not self._request.options.drop_source or self._model_dir is None:
            return
        for shard in (record.shard, *sorted(self._related_to(record.shard))):
            if shard not in self.dropped and self._is_free(shard):
                with self._trace.span("drop", shard):
                    self._drop(shard, self._model_dir)

    def keep(self, manifest: Manifest) -> None:
        """Bring the record up to date with a published manifest, once anything was removed.

        Raises StoreError when this run removed something; else a cache that cannot be written
        serves as it is.
        """
        known = {(r.shard, r.source_sha256) for r in self._record.manifest.entries if r.dropped}
        entries = [
            replace(r, dropped=r.dropped or (r.shard, r.source_sha256) in known)
            for r in manifest.entries
        ]
        if not any(record.dropped for record in entries):
            return
        record = replace(self._record, manifest=replace(manifest, entries=tuple(entries)))
        try:
            if record != self._before or not is_stored(self._request.store, record):
                write_record(self._request.store, record)
        except StoreError as error:
            if self._request.options.drop_source:
                raise
            logger.warning("%s", error)

    def _related_to(self, shard: str) -> set[str]:
        """Return the shards that this one's task may have made free."""
        if self._request.target.variant.dtype == "source":
            return self._related[shard]
        return self._tasks.keys() - {shard}

    def _is_free(self, shard: str) -> bool:
        needed = {shard} | self._related_to(shard)
        return needed <= self._finished.keys()

    def _drop(self, shard: str, model_dir: Folder) -> None:
        lenders = self._tasks[shard].borrowed.keys()
        borrowers = [n for n in self._related[shard] if shard in self._tasks[n].borrowed]
        for name in (shard, *borrowers):
            self._read_back(name)
        for lender in lenders:
            self._check_lent(model_dir, lender, shard)
        for borrower in borrowers:
            self._check_lent(model_dir, shard, borrower)
        source = self._source(model_dir, shard)
        self._write_record(shard, source.header())
        if not self._noted and self._needs_note():
            write_note(model_dir, self._record.id, required=self._has_older())
        self._noted = True
        source.remove()
        self.dropped[shard] = replace(self._finished[shard], dropped=True)
        self._proved.pop(shard).close()

    def _source(self, model_dir: Folder, shard: str) -> SourceFile:
        """Open a source, once, and hash it: it must be the one that was converted."""
        if shard not in self._proved:
            record, path = self._finished[shard], self._request.source.directory / shard
            source = SourceFile(model_dir, shard)
            with contextlib.ExitStack() as stack:
                stack.callback(source.close)
                if source.sha256() != record.source_sha256:
                    # one of the two reads may have been bad: the next run must not believe either
                    self._request.store.digest_cache.forget(source.stamp)
                    raise SourceChangedError(f"{path}: changed since it was converted; run again")
                stack.pop_all()
            self._proved[shard] = source
        return self._proved[shard]

    def _check_lent(self, model_dir: Folder, lender: str, borrower: str) -> None:
        """Raise SourceChangedError unless a lender holds what the borrower's entry was made of."""
        if lender in self.dropped:  # checked when it was removed
            return
        parts = self._tasks[borrower].borrowed
        before = dict(zip(parts, self._finished[borrower].borrowed_sha256, strict=True))[lender]
        source = self._source(model_dir, lender)
        if source.lent_sha256(parts[lender]) != before:
            raise SourceChangedError(
                f"{source.path}: what {borrower} borrowed from it changed since that was "
                "converted; run again"
            )

    def _read_back(self, shard: str) -> None:
        """Hash an entry as it lies on the disk, once, and make it durable."""
        if shard in self._sound or shard in self.dropped:
            return
        store, record = self._request.store, self._finished[shard]
        for _ in range(2):  # one bad read is no damage
            problem = confirmed_defect(record, store)
            if not problem:
                break
        else:
            raise take_out(store, record, f"{problem} when it was read back; {shard} stays")
        store.sync_entry(record.key)  # an older run or version may have published it
        self._sound.add(shard)

    def _write_record(self, shard: str, header: bytes) -> None:
        """Make durable, twice, that a shard may be removed."""
        gone = {*self.dropped, shard}
        entries = [replace(r, dropped=r.shard in gone) for r in self._finished.values()]
        headers = {**self._record.headers, shard: header}
        manifest = self._manifest_of(entries)
        self._record = replace(self._record, manifest=manifest, headers=headers)
        write_record(self._request.store, self._record)

    def _has_older(self) -> bool:
        """Tell whether an older conversion or drop would be used if there were no note."""
        directory, config = self._request.source.directory, self._request.source.config
        return (
            os.path.lexists(directory / IN_PLACE)
            or read_note(directory) is not None
            or any(
                record.id != self._record.id and record.manifest.config_sha256 == config.sha256
                for record in read_records(self._request.store)
            )
        )

    def _needs_note(self) -> bool:
        """Tell whether the path alone may lead to another record later.

        Not beside a model, and not at a commit of the Hub, unless an older note or an older
        conversion beside the model would.
        """
        directory, request = self._request.source.directory, self._request
        if request.target.in_place or request.source.remote is not None:
            if request.target.in_place:
                older = any(i != self._record.id for i in record_ids(request.store))
            else:
                older = os.path.lexists(directory / IN_PLACE)
            return older or read_note(directory) is not None
        return True


def _related(tasks: Sequence[Task]) -> dict[str, set[str]]:
    """Return for each shard those that lend parts to it or borrow parts from it."""
    found: dict[str, set[str]] = {task.shard: set() for task in tasks}
    for task in tasks:
        for lender in task.borrowed:
            found[task.shard].add(lender)
            found[lender].add(task.shard)
    return found
