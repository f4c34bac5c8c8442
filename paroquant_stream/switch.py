"""`python -m paroquant_stream.switch ...`, which is `paroquant-stream switch ...`."""

import sys

from .cli.switch import main

if __name__ == "__main__":
    sys.exit(main())
