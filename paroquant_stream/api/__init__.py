"""The public functions.

Imports integrations, exports, maintenance, conversion and model.
"""
