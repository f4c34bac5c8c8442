"""Imported at the start of an interpreter: `install()` follows once a loader's module is imported.

By then nothing else is imported, so that the other programs of the interpreter start as fast as
before. The switch (`paroquant-stream switch on`) and the children of `run` import this module.
"""

from __future__ import annotations

from types import ModuleType

from .integrations.import_hook import LOADER_MODULES, after_import, forget


def watch() -> None:
    """Wait for the import of a module whose loader is to be replaced."""
    for name in LOADER_MODULES:
        after_import(name, _install)


def _install(_module: ModuleType) -> None:
    """Install; what fails is a warning, as the program did not ask for anything."""
    forget(_install)
    import logging

    try:
        from .api.install import install
        from .integrations.switch import options_from_environment

        install(**options_from_environment())
    except Exception as error:  # the program would go on without this package too
        logger = logging.getLogger(__name__)
        logger.warning("ParoQuant models are not loaded by paroquant_stream: %s", error)


watch()
