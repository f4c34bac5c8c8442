"""The conversion of one shard: units of work, what workers do with them, and the new entry.

Imports errors, plan, checkpoint, store, execution and files.
"""
