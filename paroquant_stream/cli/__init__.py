"""The commands; the only code that prints.

Imports everything below.
"""
