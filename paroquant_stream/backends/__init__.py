"""The only code that calls mlx-lm and mlx-vlm.

Imports errors and text.
"""
