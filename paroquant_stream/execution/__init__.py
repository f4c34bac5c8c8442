"""Where units of work run: inline, threads, processes, Dask, any executor.

Imports errors and trace alone.
"""
