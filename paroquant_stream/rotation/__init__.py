"""The rotated layers of a ParoQuant model, and the kernels that rotate.

Imports nothing else of this package.
"""
