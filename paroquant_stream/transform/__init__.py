"""The worker side of a conversion: convert one shard and publish its entry.

Imports errors, plan, checkpoint, store, execution and files.
"""
