"""A model over several ranks: by layers or by tensors.

Imports rotation, backends, store, checkpoint and files.
"""
