"""Loggers for modules of a run without work: they import `logging`, 4 ms, with the first message.

Other modules use `logging.getLogger(__name__)`, and both name the same loggers.
"""

from __future__ import annotations


class Logger:
    """The logger of a module."""

    def __init__(self, name: str) -> None:
        """Name the logger.

        Args:
            name: The module's `__name__`.
        """
        self._name = name

    def info(self, message: str, *values: object) -> None:
        """Log what a user may want to know."""
        import logging  # late, see above

        logging.getLogger(self._name).info(message, *values, stacklevel=2)

    def warning(self, message: str, *values: object) -> None:
        """Log what a user should know."""
        import logging  # late, see above

        logging.getLogger(self._name).warning(message, *values, stacklevel=2)
