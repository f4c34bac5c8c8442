"""`python -m paroquant_stream.export ...`, which is `paroquant-stream export ...`."""

from .cli.common import end_with
from .cli.export import main

if __name__ == "__main__":
    end_with(main)
