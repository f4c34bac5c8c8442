"""What lies in a cache, and taking care of it; nothing here imports MLX.

Imports conversion and what is below.
"""
