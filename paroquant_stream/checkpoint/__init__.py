"""The source model: a directory or a Hub repository, its config, index, shards and layout.

Imports `files`, `errors` and `text`.
"""
