"""`python -m paroquant_stream.cache ...`, which is `paroquant-stream cache ...`."""

from .cli.cache import main
from .cli.common import end_with

if __name__ == "__main__":
    end_with(main)
