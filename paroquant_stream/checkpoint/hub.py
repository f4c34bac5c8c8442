"""Models named by a Hub repository id: their small files at once, their shards when asked.

The commit is the one of the first answer and every later request names it, so a branch that moves
meanwhile never mixes two revisions. Files land in the Hub's own cache by its own functions, so that
other programs share them.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, ParoquantStreamError
from ..files.tensor_header import Header, parse_header
from ..text import one_line
from .hub_watch import Watch, together
from .model_files import size_limit

logger = logging.getLogger(__name__)

PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
"""What a model needs beside its shards: no code (`*.py`) and no pickles (`*.bin`) are fetched."""
_FIRST_BYTES = 1 << 18  # of a shard, by range; a header of 1,500 tensors fits


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit; an `arrival.Remote`."""

    name: str
    commit: str

    def headers(self, shards: Sequence[str]) -> dict[str, Header]:
        """The headers of these shards, each by a range request of its first bytes.

        Raises CheckpointError naming all of them when one cannot be had, MalformedFileError when one is
        not valid.
        """
        calls = [
            (f"{self.name}: header of {shard}", partial(self._header, shard)) for shard in shards
        ]
        try:
            return dict(zip(shards, together(calls), strict=True))
        except ParoquantStreamError:
            raise
        except Exception as error:  # the Hub's client raises a dozen unrelated kinds
            listed = ", ".join(shards[:3]) + (f" and {len(shards) - 3} more" * (len(shards) > 3))
            raise CheckpointError(
                f"{self.name} at {self.commit[:12]}: not in the Hub's cache: {listed}; "
                f"and the Hub does not give it: {one_line(error)}"
            ) from error

    def fetch(self, shard: str, tick: Callable[[int], None]) -> None:
        """Downloads a shard into the Hub's cache. Raises CheckpointError."""
        together([_download(self.name, shard, self.commit, tick)])

    def _header(self, shard: str, _watch: Watch) -> Header:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.name, shard, revision=self.commit)
        head, size = _first_bytes(url, _FIRST_BYTES)

        def read(start: int, length: int) -> bytes:
            nonlocal head
            if start + length > len(head):
                head, _ = _first_bytes(url, start + length)
            return head[start : start + length]

        return parse_header(read, size, f"{self.name}/{shard}")


def locate(model: str | Path, revision: str | None = None) -> tuple[Path, HubModel | None]:
    """The directory of a model, and where its shards come from if it is named by a repository id.

    Of a repository the config, index and tokenizer are fetched, no shard; `revision` is a branch,
    tag or commit, default `main`. Without a network what the Hub's cache has must do.

    Raises CheckpointError when `model` is neither a directory nor a repository that can be had.
    """
    path = Path(model).expanduser()
    if os.path.isdir(path):  # pathlib raises on a disk error
        if revision:
            raise CheckpointError(f"{path}: a directory has no revision; --revision is for the Hub")
        return path, None
    name = str(model)
    if os.path.exists(path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model}: neither a model directory nor a repository id like owner/name"
        )
    try:
        directory = Path(together([_download(name, "config.json", revision)])[0]).parent
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor is there a directory of this name") from error
    remote = HubModel(name, directory.name)
    _fetch_small(remote)
    return directory, remote


def _fetch_small(remote: HubModel) -> None:
    from huggingface_hub import HfApi

    def ask(_watch: Watch) -> list[str]:
        info = HfApi().model_info(remote.name, revision=remote.commit)
        return [file.rfilename for file in info.siblings or []]

    try:
        (names,) = together([(f"{remote.name}: its list of files", ask)])
    except ParoquantStreamError:  # a Hub that is there and gives next to nothing
        raise
    except Exception as error:  # no network, a token that expired: as above, a dozen kinds
        logger.info("%s: going on with the Hub's cache: %s", remote.name, one_line(error))
        return
    small = [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in PATTERNS)]
    together([_download(remote.name, name, remote.commit) for name in small])


def _download(
    name: str, file: str, revision: str | None, tick: Callable[[int], None] = lambda _: None
) -> tuple[str, Callable[[Watch], str]]:
    """A call for `together`: the path of a file in the Hub's cache, downloaded if it is absent."""

    def call(watch: Watch) -> str:
        from huggingface_hub import hf_hub_download  # 0.3 s, for models from the Hub alone

        bar = watch.bar(tick, size_limit(file))
        try:
            return str(hf_hub_download(name, file, revision=revision, tqdm_class=bar))
        except ParoquantStreamError:  # from the bar
            raise
        except Exception as error:  # the Hub's client raises a dozen unrelated kinds
            raise CheckpointError(
                f"{name}: {file} cannot be had from the Hub: {one_line(error)}"
            ) from error

    return f"{name}: {file} cannot be had from the Hub", call


def _first_bytes(url: str, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a file, or all if it is shorter, and its size."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {
        "Range": f"bytes=0-{count - 1}",
        "Accept-Encoding": "identity",
    }
    with get_session().stream(
        "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        given = response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(given or response.headers["Content-Length"])
        head = bytearray()
        for chunk in response.iter_bytes():  # a server that knows no ranges sends the whole file
            head += chunk
            if len(head) >= count:
                break
    return bytes(head[:count]), size
