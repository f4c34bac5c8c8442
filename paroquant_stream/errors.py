"""Every error that paroquant_stream raises on purpose, under four bases.

Each error takes one message (what, where, expected, found, what to do) and can be pickled: a worker
process returns its error to the parent. The README lists them in a table.
"""

from __future__ import annotations


class ParoquantStreamError(Exception):
    """Base of all errors raised on purpose; a command prints the message and exits with 1."""


class CheckpointError(ParoquantStreamError):
    """The model directory cannot be used: its config, index or a shard is missing or damaged."""


class MalformedFileError(CheckpointError):
    """A file is not valid safetensors or JSON, or exceeds a limit that no real checkpoint needs."""


class LayoutError(CheckpointError):
    """The quantized layers have no known naming scheme, or more than one."""


class PlanError(CheckpointError):
    """Tensors are missing, unexpected, duplicated or of a wrong shape; lists every one."""


class UnreadableFileError(CheckpointError):
    """The operating system cannot read an existing file; names the file and the reason."""


class MissingTokenizerError(CheckpointError):
    """The model directory has no vocabulary of a tokenizer; names the files that are expected."""


class OutOfRangeError(CheckpointError):
    """A finite value would be infinite in the requested dtype; names its tensor and shard."""


class SourceChangedError(CheckpointError):
    """A shard's bytes changed while they were read; nothing was stored."""


class SourceDamagedError(CheckpointError):
    """A downloaded shard does not have the SHA-256 that the Hub states; nothing was stored."""


class SourceDroppedError(CheckpointError):
    """A shard that `--drop-source` removed must be read again; names it and what changed."""


class StoreError(ParoquantStreamError):
    """The cache, or another file that is written, cannot be read or written."""


class UnwritableFileError(StoreError):
    """A file outside the cache cannot be written; names the file and the reason."""


class EntryDamagedError(StoreError):
    """An entry's bytes are not those that were written; the entry is no longer used."""

    key = ""
    """The key of the entry."""


class ManifestError(StoreError):
    """A manifest is damaged or from a newer format; it is treated as absent."""


class NewerManifestError(ManifestError):
    """A manifest is from a newer format: its entries are unknown, so none is removed."""


class ModelError(ParoquantStreamError):
    """The MLX model cannot be built from the stored tensors."""


class AssemblyError(ModelError):
    """The stored tensors and the model's parameters do not match one to one; lists each."""


class MissingPartError(ModelError):
    """The requested part of a model does not exist, or a part that was not loaded is used."""


class SplitError(ModelError):
    """The model cannot be split over the ranks of a group; names its class or the layer."""


class ExecutionError(ParoquantStreamError):
    """The run cannot continue: a package, program or worker is missing, or it was cancelled."""


class MissingExtraError(ExecutionError):
    """A required optional package is not installed; names the extra that installs it."""


class ProgramNotFoundError(ExecutionError):
    """The program to run is neither a module nor a readable file of Python code."""


class WorkersUnfitError(ExecutionError):
    """Workers lack the package, run other code, or cannot see the files; names what they lack."""


class WorkersLostError(ExecutionError):
    """Remote workers, or their scheduler, cannot be reached or have ended."""


class SomeModelsFailedError(ExecutionError):
    """Some of several models were not converted; names each and the reason."""

    failures: dict[str, ParoquantStreamError]
    """The error of each model that was not converted, by the name that it was asked for by."""

    def __init__(
        self, message: str, failures: dict[str, ParoquantStreamError] | None = None
    ) -> None:
        super().__init__(message)  # alone: pickle passes these arguments, and adds `failures`
        self.failures = failures or {}


class RunCancelledError(ExecutionError):
    """The run was cancelled while this shard was being converted."""
