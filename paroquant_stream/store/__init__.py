"""The cache on disk: entries, manifests, drop records of removed sources, and locks.

Imports `files`, `errors` and `trace`.
"""
