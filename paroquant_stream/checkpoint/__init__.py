"""The source: a model directory or a Hub repository, its config, index, shards and layout.

Imports files.
"""
