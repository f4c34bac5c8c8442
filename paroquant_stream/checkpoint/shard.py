"""One .safetensors file of a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files.descriptor import closing
from ..files.digest_cache import DigestCache, hash_file
from ..files.tensor_header import Header, read_header
from ..log import Logger
from .model_files import hub_blob, open_inside

logger = Logger(__name__)
SHARD_NAME = r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}\.safetensors"
"""The names that an index may contain: none of them leads out of the directory."""


@dataclass(frozen=True)
class Shard:
    """One `.safetensors` file of a checkpoint."""

    name: str
    path: Path

    def open(self) -> int:
        """Open the shard for reading.

        A symlink is followed only inside the model directory or to a blob of its own repository in
        the Hub's cache.

        Returns:
            A descriptor, which the caller closes.

        Raises:
            CheckpointError: The file is absent, cannot be opened or is a link to elsewhere.
            MalformedFileError: It is not a regular file.
        """
        try:
            return open_inside(self.path)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: the shard is absent; download it again") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error

    def header(self) -> Header:
        """Read and validate the header.

        Raises:
            CheckpointError: The shard is absent or cannot be opened.
            MalformedFileError: It is not a valid safetensors file.
        """
        with closing(self.open()) as fd:
            return read_header(fd, str(self.path))

    def sha256(self, digest_cache: DigestCache) -> str:
        """Hash the whole shard and store its SHA-256 in the digest cache.

        Args:
            digest_cache: The digest cache.

        Returns:
            64 hex digits.

        Raises:
            CheckpointError: The shard is absent, cannot be read or changed meanwhile.
        """
        with closing(self.open()) as fd:
            logger.info("%s: hashing", self.path)
            return hash_file(fd, str(self.path), digest_cache, self.hub_sha256)

    def known_sha256(self, digest_cache: DigestCache, fd: int | None = None) -> str | None:
        """Look up the shard's SHA-256 in the digest cache.

        The name of a blob in the Hub's cache is not enough, see the digest cache.

        Args:
            digest_cache: The digest cache.
            fd: A descriptor of the shard, if it is open.

        Returns:
            64 hex digits; None if the shard must be hashed.

        Raises:
            CheckpointError: The shard is absent or cannot be opened.
            MalformedFileError: It is not a regular file.
        """
        if fd is None:
            with closing(self.open()) as opened:
                return self.known_sha256(digest_cache, opened)
        return digest_cache.lookup(fd, self.hub_sha256)

    @property
    def hub_sha256(self) -> str | None:
        """Return the SHA-256 in the name of the Hub's blob that the shard links to, or None.

        Only one link is followed: since huggingface_hub PR 4498 the blob may itself be a link, and
        its target is named by a Xet hash, which has 64 hex digits but is not a SHA-256. The name is
        what the server announced; the bytes in the file may differ.
        """
        blob = hub_blob(self.path)
        return blob.name if blob and re.fullmatch("[0-9a-f]{64}", blob.name) else None
