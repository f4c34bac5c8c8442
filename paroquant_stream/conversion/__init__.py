"""The caller side of a conversion: from a model directory to a published manifest.

Imports transform, plan, store, checkpoint, execution and files.
"""
