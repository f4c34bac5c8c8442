"""`python -m paroquant_stream.run ...`, which is `paroquant-stream run ...`."""

import sys

from .cli.run import main

if __name__ == "__main__":
    sys.exit(main())
