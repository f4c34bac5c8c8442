"""Small entries and temp files in a store."""

from __future__ import annotations

import os

from paroquant_stream.store.store import Store

KEY = "ab" * 32


def publish(store: Store, data: bytes, key: str = KEY) -> None:
    """Publish an entry of any bytes."""
    with store.new_file(len(data)) as file:
        file.write(memoryview(data))
        store.publish_entry(file, key)


def temps(store: Store) -> list[str]:
    """List the names of the store's temp files."""
    return os.listdir(store.folder("tmp"))
