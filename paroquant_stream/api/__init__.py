"""The public functions of paroquant_stream.

Imports integrations, exports, maintenance, conversion and model, and what is below them.
"""
