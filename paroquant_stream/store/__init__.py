"""The cache on disk: entries, manifests, records of removed sources, locks.

Imports files.
"""
