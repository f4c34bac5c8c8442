"""`python -m paroquant_stream COMMAND ...`, which is `paroquant-stream COMMAND ...`."""

from .cli.main import console

if __name__ == "__main__":
    console()
