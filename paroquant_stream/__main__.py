"""`python -m paroquant_stream COMMAND ...`, which is `paroquant-stream COMMAND ...`."""
# PYTHON_ARGCOMPLETE_OK: see cli/main.py

from .cli.main import console

if __name__ == "__main__":
    console()
