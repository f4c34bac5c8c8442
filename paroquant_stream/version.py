"""The version of this package, for what is written into files and shown to people."""

__version__ = "0.1.0"
