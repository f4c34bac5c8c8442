"""All that touches mlx-lm and mlx-vlm.

Imports checkpoint and files.
"""
