"""Files and directories by descriptor: safetensors headers and writing, hashes, atomic publication.

Imports errors and trace alone.
"""
