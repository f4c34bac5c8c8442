"""Decide what each shard gives: tasks made of operations, from headers and config alone.

Imports checkpoint, store and files.
"""
