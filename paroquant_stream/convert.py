"""`python -m paroquant_stream.convert ...`, which is `paroquant-stream convert ...`."""

from .cli.common import end_with
from .cli.convert import main

if __name__ == "__main__":
    end_with(main)
