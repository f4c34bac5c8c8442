"""Models named by a Hub repository id: small files are fetched at once, shards on demand.

The first response fixes the commit and every later request names it, so that a branch that moves
meanwhile never mixes two revisions. huggingface_hub's own functions download into its cache, which
other programs share.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, ParoquantStreamError
from ..files.tensor_header import Header, parse_header
from ..text import one_line
from .hub_watch import Watch, run_calls
from .model_files import size_limit

logger = logging.getLogger(__name__)

PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
"""The files of a model beside its shards; code (`*.py`) and pickles (`*.bin`) are not fetched."""
_CONNECT_TIMEOUT = 10.0  # s
_FIRST_BYTES = 1 << 18  # enough for the header of a shard of 1,500 tensors


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit; implements `prefetch.Remote`."""

    name: str
    """The repository id, `owner/name`."""
    commit: str

    def headers(self, shards: Sequence[str]) -> dict[str, Header]:
        """Read the headers of these shards, each by a range request for its first bytes.

        Args:
            shards: File names in the repository.

        Returns:
            Shard name -> its header.

        Raises:
            CheckpointError: A header cannot be downloaded; names the shards.
            MalformedFileError: A header is not valid.
        """
        calls = [
            (f"{self.name}: header of {shard}", partial(self._header, shard)) for shard in shards
        ]
        try:
            return dict(zip(shards, run_calls(calls), strict=True))
        except ParoquantStreamError:
            raise
        except Exception as error:  # the Hub's client raises a dozen unrelated kinds
            listed = ", ".join(shards[:3]) + (f" and {len(shards) - 3} more" * (len(shards) > 3))
            raise CheckpointError(
                f"{self.name} at {self.commit[:12]}: not in the Hub's cache: {listed}; "
                f"and cannot be downloaded from the Hub: {one_line(error)}"
            ) from error

    def fetch(self, shard: str, tick: Callable[[int], None]) -> None:
        """Download a shard into the Hub's cache.

        Args:
            shard: A file name in the repository.
            tick: Called with the bytes of each chunk; may raise to stop the download.

        Raises:
            CheckpointError: It cannot be downloaded.
        """
        run_calls([_download(self.name, shard, self.commit, tick)])

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


def fetch_model(name: str, revision: str | None, spelled: str) -> tuple[Path, HubModel]:
    """Download the files of a repository beside its shards.

    Args:
        name: The repository id, which is no directory.
        revision: A branch, tag or commit, `main` by default.
        spelled: How the user names it.

    Returns:
        The directory of the snapshot, and where its absent shards come from.

    Raises:
        CheckpointError: They cannot be downloaded and are not in the Hub's cache.
    """
    directory, why_offline = fetch_config(name, revision, spelled)
    remote = HubModel(name, directory.name)
    if why_offline:
        logger.info("%s: using the Hub's cache alone: %s", name, why_offline)
    else:
        _fetch_small(remote)
    return directory, remote


def fetch_config(
    name: str, revision: str | None = None, spelled: str = ""
) -> tuple[Path, str | None]:
    """Download the config.json of a repository, and no other file.

    Args:
        name: The repository id, which is no directory.
        revision: A branch, tag or commit, `main` by default.
        spelled: How the user names it, if not by its id.

    Returns:
        The directory of the snapshot, whose name is the commit, and why the Hub was not asked.

    Raises:
        CheckpointError: It cannot be downloaded and is not in the Hub's cache.
    """
    (why_offline,) = run_calls([(f"{name}: look for the Hub", _why_offline)])
    try:
        call = _download(name, "config.json", revision, local=bool(why_offline))
        return Path(run_calls([call])[0]).parent, why_offline
    except CheckpointError as error:
        if why_offline:
            raise CheckpointError(f"{spelled or name}: no such directory; {why_offline}") from error
        raise CheckpointError(f"{error}; and no directory of this name exists") from error


def _why_offline(_watch: Watch) -> str | None:
    """Tell why no request to the Hub can succeed, at once: its client tries again for 23 s."""
    import socket  # 4 ms, for models from the Hub alone
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            "as a Hub id it is not in the Hub's cache, and HF_HUB_OFFLINE is set, so that nothing "
            "is downloaded"
        )
    url = urlsplit(constants.ENDPOINT)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    if getproxies().keys() & {url.scheme, "all"} and not proxy_bypass(host):
        return None  # the proxy looks for the host
    try:
        socket.create_connection((host, port), _CONNECT_TIMEOUT).close()
    except OSError as error:
        return f"as a Hub id it cannot be reached: {host}: {error.strerror or error}"
    return None


def _fetch_small(remote: HubModel) -> None:
    from huggingface_hub import HfApi

    def list_files(_watch: Watch) -> list[str]:
        info = HfApi().model_info(remote.name, revision=remote.commit)
        return [file.rfilename for file in info.siblings or []]

    try:
        (names,) = run_calls([(f"{remote.name}: list of files", list_files)])
    except ParoquantStreamError:  # the Hub responds, but too slowly
        raise
    except Exception as error:  # no network, an expired token: a dozen unrelated kinds
        logger.info("%s: using the Hub's cache alone: %s", remote.name, one_line(error))
        return
    small = [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in PATTERNS)]
    run_calls([_download(remote.name, name, remote.commit) for name in small])


def _download(
    name: str,
    file: str,
    revision: str | None,
    tick: Callable[[int], None] = lambda _: None,
    local: bool = False,
) -> tuple[str, Callable[[Watch], str]]:
    """Make a call for `run_calls` that returns the path of a file in the Hub's cache."""

    def call(watch: Watch) -> str:
        from huggingface_hub import hf_hub_download  # slow, and only models from the Hub need it

        bar = watch.bar(tick, size_limit(file))
        try:
            return str(
                hf_hub_download(
                    name, file, revision=revision, tqdm_class=bar, local_files_only=local
                )
            )
        except ParoquantStreamError:  # from the bar
            raise
        except Exception as error:  # the Hub's client raises a dozen unrelated kinds
            raise CheckpointError(f"{label}: {one_line(error)}") from error

    label = f"{name}: {file} cannot be downloaded from the Hub"
    return label, call


def _first_bytes(url: str, count: int) -> tuple[bytes, int]:
    """Return up to `count` bytes from the start of a file, and the file's size."""
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
        whole_size = response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(whole_size or response.headers["Content-Length"])
        head = bytearray()
        for chunk in response.iter_bytes():  # a server without range support sends the whole file
            head += chunk
            if len(head) >= count:
                break
    return bytes(head[:count]), size
