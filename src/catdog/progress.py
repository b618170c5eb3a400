"""Progress bars with rate and time left, on a terminal; silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], name: str, total: int, unit: str) -> Iterator[Item]:
    """Passes items on and shows how far it is, on standard error.

    Args:
        items: what is worked on.
        name: what is being done, e.g. "embed".
        total: number of items.
        unit: of one item, e.g. "images".
    """
    yield from tqdm(items, name, total, unit=f" {unit}", disable=not sys.stderr.isatty())
