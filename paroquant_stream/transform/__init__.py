"""The worker side of a conversion: one task in, one published entry out.

Imports plan, checkpoint, store, execution and files.
"""
