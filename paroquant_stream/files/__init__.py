"""Reading and writing files: safetensors headers, hashes, directories by descriptor, atomic writes.

May import errors and trace only.
"""
