"""Other forms of a converted model: an MLX directory, a single file.

Imports conversion and model.
"""
