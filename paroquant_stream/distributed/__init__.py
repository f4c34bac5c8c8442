"""Parts of a model: a range of layers, a pipeline rank's layers, or a part of every layer.

Imports errors, rotation, backends, store, checkpoint and files.
"""
