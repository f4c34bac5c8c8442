"""The commands; only they and the progress bar print.

Imports everything below.
"""
