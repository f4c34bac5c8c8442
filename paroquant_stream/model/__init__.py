"""The MLX model, assembled from stored tensors.

Imports distributed, backends, rotation, store and what is below; never conversion.
"""
