"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class CatdogError(Exception):
    """A mistake in the input or the environment, told in one sentence.

    The message names the thing, its value and what to do. Entry points print it without a
    traceback and exit with code 2; every other exception is a defect of the program and keeps
    its traceback.
    """
