"""Every error that paroquant_stream raises on purpose, under four bases.

Each takes one readable message (what, where, expected, found, what to do) and nothing else, so that
it pickles: a worker's error must reach the parent whole. The README's table tells what to do.
"""


class ParoquantStreamError(Exception):
    """Base of all errors raised on purpose; a command prints it as one message and exits with 1."""


class CheckpointError(ParoquantStreamError):
    """The model directory cannot be used: its config, index or a shard is missing or damaged."""


class MalformedFileError(CheckpointError):
    """A file is not valid safetensors, or holds what no ParoQuant checkpoint needs."""


class LayoutError(CheckpointError):
    """The checkpoint spells its quantized linears in no known layout, or in two at once."""


class PlanError(CheckpointError):
    """Parts are missing, left over, doubled or of a shape that does not fit; lists every one."""


class UnreadableFileError(CheckpointError):
    """The system cannot read a file that is there; names the file and the system's reason."""


class OutOfRangeError(CheckpointError):
    """A finite value would be infinite in the dtype asked for; names its tensor and shard."""


class SourceChangedError(CheckpointError):
    """A shard's bytes changed while they were read; nothing was stored."""


class SourceDamagedError(CheckpointError):
    """A downloaded shard's bytes are not those that the Hub names; nothing was stored."""


class SourceDroppedError(CheckpointError):
    """A shard must be read again that `--drop-source` removed; names it and what changed."""


class StoreError(ParoquantStreamError):
    """The cache, or a file that is written beside it, cannot be read or written."""


class UnwritableFileError(StoreError):
    """A file outside of the cache cannot be written; names it and the system's reason."""


class EntryDamagedError(StoreError):
    """An entry's bytes are not those that were written; it was taken out of use."""


class ManifestError(StoreError):
    """A manifest's bytes are damaged or from a newer format; treated as no manifest."""


class NewerManifestError(ManifestError):
    """A manifest is from a newer format: which entries it names is unknown, so they stay."""


class ModelError(ParoquantStreamError):
    """The MLX model cannot be built from what is stored."""


class AssemblyError(ModelError):
    """The stored tensors and the model's parameters do not match one to one; lists each."""


class MissingPartError(ModelError):
    """The part of a model that was asked for does not exist, or one not loaded is used."""


class SplitError(ModelError):
    """The model cannot be split over the ranks of a group; names its class or the layer."""


class ExecutionError(ParoquantStreamError):
    """The run cannot go on: a package, a program or a worker is missing, or a run was stopped."""


class MissingExtraError(ExecutionError):
    """An optional package is needed and not installed; names the extra that brings it."""


class LoaderMovedError(ExecutionError):
    """The installed paroquant has no MLX loader that ours could replace; names its version."""


class ProgramNotFoundError(ExecutionError):
    """The program to run is no module and no file that can be read."""


class WorkersUnfitError(ExecutionError):
    """Remote workers lack the package or do not see the files; names each and what it lacks."""


class WorkersLostError(ExecutionError):
    """Remote workers, or their scheduler, cannot be reached or have ended."""


class SomeModelsFailedError(ExecutionError):
    """Of several models some were not converted; names each and why. The others are."""


class RunCancelledError(ExecutionError):
    """The run was told to stop while this shard was being converted."""
