"""Where units of work run: inline, in threads, in worker processes, on Dask or on any executor.

Imports errors, text and trace alone.
"""
