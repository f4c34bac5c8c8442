"""Assembles the MLX model from stored tensors.

Imports distributed, backends, rotation, plan, store, checkpoint and files; never conversion.
"""
