"""Replaces the loaders of other packages by the one of paroquant_stream.

Imports errors.
"""
