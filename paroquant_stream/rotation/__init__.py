"""The rotated layers of a ParoQuant model and the kernels that compute the rotation.

Imports no other package of paroquant_stream.
"""
