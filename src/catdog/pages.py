"""What the HTML pages share: their templates, and how text from a data set gets into them."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import jinja2


def load_template(name: str) -> jinja2.Template:
    """Loads a page's template of `catdog/templates`.

    Everything that goes into it is escaped, and a name that it uses but is not given is an error. Its filters are
    `printable`, for text from a data set, and `number`, with commas between the thousands.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("catdog"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment.get_template(name)


def printable(text: object) -> str:
    """Shows what a reader could not see or would be misled by (line breaks, changes of direction) as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in str(text)
    )


def data_uri(data: bytes, kind: Literal["jpeg", "png"]) -> str:
    """Returns a picture as an address that holds the picture itself, so that a page needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
