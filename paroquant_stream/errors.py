"""Every error that paroquant_stream raises on purpose.

Each takes one readable message (what, where, expected, found, what to do) and nothing else, so that
it pickles: a worker's error must reach the parent whole.
"""


class ParoquantStreamError(Exception):
    """Base of all errors raised on purpose; a command prints it as one message and exits with 1."""


class CheckpointError(ParoquantStreamError):
    """The model directory cannot be used: its config, index or a shard is missing or damaged."""


class MalformedFile(ParoquantStreamError):
    """A file is not valid safetensors, or holds what no ParoQuant checkpoint needs."""


class LayoutError(ParoquantStreamError):
    """The checkpoint spells its quantized linears in no known layout, or in two at once."""


class PlanError(ParoquantStreamError):
    """Parts are missing, left over, doubled or of a shape that does not fit; lists every one."""


class UnreadableFile(ParoquantStreamError):
    """The system cannot read a file that is there; names the file and the system's reason."""


class UnwritableFile(ParoquantStreamError):
    """A file outside of the cache cannot be written; names it and the system's reason."""


class OutOfRange(ParoquantStreamError):
    """A finite value would be infinite in the dtype asked for; names its tensor and shard."""


class SourceChanged(ParoquantStreamError):
    """A shard's bytes changed while they were read; nothing was stored."""


class SourceDamaged(ParoquantStreamError):
    """A downloaded shard's bytes are not those that the Hub names; nothing was stored."""


class SourceDropped(ParoquantStreamError):
    """A shard must be read again that `--drop-source` removed; names it and what changed."""


class StoreError(ParoquantStreamError):
    """The cache cannot be read or written."""


class EntryDamaged(StoreError):
    """An entry's bytes are not those that were written; it was taken out of use."""


class ManifestError(ParoquantStreamError):
    """A manifest's bytes are damaged or from a newer format; treated as no manifest."""


class NewerManifest(ManifestError):
    """A manifest is from a newer format: which entries it names cannot be told, so they stay."""


class AssemblyError(ParoquantStreamError):
    """The stored tensors and the model's parameters do not match one to one; lists every
    difference.
    """


class NoSuchPart(ParoquantStreamError):
    """The part of a model that was asked for is not to be had, or one that was not loaded is used;
    names what there is.
    """


class ShardingError(ParoquantStreamError):
    """The model cannot be split over the ranks of a group; names its class or the layer."""


class MissingExtra(ParoquantStreamError):
    """An optional package is needed and not installed; names the extra that brings it."""


class LoaderMoved(ParoquantStreamError):
    """The installed paroquant has no MLX loader that ours could replace; names its version."""


class ProgramNotFound(ParoquantStreamError):
    """The program to run is no module and no file that can be read."""


class WorkersUnfit(ParoquantStreamError):
    """Workers elsewhere lack the package or do not see the files; names each and what it lacks."""


class WorkersLost(ParoquantStreamError):
    """Workers elsewhere, or their scheduler, cannot be reached or have ended."""


class SomeFailed(ParoquantStreamError):
    """Of several models some were not converted; names each and why. The others are."""


class Cancelled(ParoquantStreamError):
    """The run was told to stop while this shard was being converted."""
