"""Requests to a server of completions."""

from __future__ import annotations

import json
import time
import urllib.request

PROMPT = "w5 w9 w17 w42 w3"


def ask(port: int, body: dict) -> str | None:
    """Return the text of a completion, or None if the server does not answer within 60 s."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(300):
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)["choices"][0]["text"]
        except OSError:
            time.sleep(0.2)
    return None
