"""Starting and ending a process quickly.

Importing TensorFlow and MLflow makes some hundred thousand objects that live to the end of the process. Python's
garbage collector walks over them again and again while they are made, and once more at the end. Measured here:
keeping it away takes `import tensorflow` from 2.9 to 2.2 seconds, and the end of a process that did it from 1.0 to 0.1.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Holds the garbage collector back while the block imports, and spares it what the block made."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextlib.contextmanager
def without(*modules: str) -> Iterator[None]:
    """Makes the block believe that these modules are not installed, but for those that were imported before."""
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]
