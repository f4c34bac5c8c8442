"""`load` as a command: `python -m tests.robustness.loading MODEL [--cache-dir DIR]` prints JSON,
parameter name -> [dtype, shape, SHA-256 of its bytes]. With `--save FILE` the parameters are also
saved there, under the model's own names.

Exit code 1 and one message for an error that is raised on purpose; a traceback for any other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--cache-dir")
    parser.add_argument("--dtype", default="source")
    parser.add_argument("--force-text", action="store_true")
    parser.add_argument("--verify", default="header")
    parser.add_argument("--save")
    arguments = parser.parse_args()
    from paroquant_stream import load
    from paroquant_stream.errors import ParoquantStreamError

    import mlx.core as mx  # isort: skip
    from mlx.utils import tree_flatten

    mx.set_default_device(mx.cpu)
    try:
        model, _, _ = load(
            arguments.model,
            force_text=arguments.force_text,
            cache_dir=arguments.cache_dir,
            dtype=arguments.dtype,
            verify=arguments.verify,
            jobs=1,
        )
    except ParoquantStreamError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    arrays = tree_flatten(model.parameters())
    if arguments.save:
        mx.save_safetensors(arguments.save, dict(arrays))
    found = {}
    for name, array in arrays:
        data = bytes(memoryview(array.reshape(-1).view(mx.uint8)))
        found[name] = [str(array.dtype), list(array.shape), hashlib.sha256(data).hexdigest()]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
