"""The published data sets that `dataset` may name, with their addresses, hashes and licences."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Published:
    """One published archive.

    Attributes:
        name: the value of `dataset`.
        urls: the current address first, then others; the hash decides whether what they give is the same.
        sha256: of the archive.
        bytes: its size.
        license: under which its publisher gives it.
        homepage: where to read about it.
        rename: puts a member into the folder of its class, or returns None to leave it out; None where the
            archive's own folders are the classes.
    """

    name: str
    urls: tuple[str, ...]
    sha256: str
    bytes: int
    license: str
    homepage: str
    rename: Callable[[str], str | None] | None = None


def _pet_breed(member: str) -> str | None:
    """`images/Maine_Coon_12.jpg` to `Maine_Coon/Maine_Coon_12.jpg`."""
    name = PurePosixPath(member).name
    match = re.fullmatch(r"(?P<breed>[A-Za-z_]+)_\d+\.\w+", name)
    return f"{match['breed']}/{name}" if match else None if member.endswith("/") else member


def _pet_species(member: str) -> str | None:
    """`images/Maine_Coon_12.jpg` to `cat/Maine_Coon_12.jpg`: breeds of cats begin with a capital letter."""
    renamed = _pet_breed(member)
    if renamed is None or renamed == member:
        return renamed
    name = PurePosixPath(renamed).name
    return f"{'cat' if name[0].isupper() else 'dog'}/{name}"


_MICROSOFT = (
    "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip"
)
# Sizes and hashes are those that TensorFlow Datasets 4.9.10 publishes for the same addresses, in
# url_checksums/cats_vs_dogs.txt and datasets/oxford_iiit_pet/checksums.tsv.
_PETS_URLS = (
    "https://thor.robots.ox.ac.uk/~vgg/data/pets/images.tar.gz",
    "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
)
_PETS_SHA256 = "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d"
_PETS_BYTES = 791_918_971
_PETS_LICENSE = "CC BY-SA 4.0"
_PETS_HOMEPAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"

PUBLISHED = {
    one.name: one
    for one in (
        Published(
            name="microsoft",
            # The Internet Archive's copy (`id_`: its original bytes) is for the day when the first one moves again.
            urls=(_MICROSOFT, f"https://web.archive.org/web/2023id_/{_MICROSOFT}"),
            sha256="b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
            bytes=824_887_076,
            license="Microsoft Research Data License Agreement (MSR-LA)",
            homepage="https://www.microsoft.com/en-us/download/details.aspx?id=54765",
        ),
        Published("oxford_pets", _PETS_URLS, _PETS_SHA256, _PETS_BYTES, _PETS_LICENSE, _PETS_HOMEPAGE, _pet_species),
        Published(
            "oxford_pets:breeds", _PETS_URLS, _PETS_SHA256, _PETS_BYTES, _PETS_LICENSE, _PETS_HOMEPAGE, _pet_breed
        ),
    )
}

KAGGLE_COMPETITION = "dogs-vs-cats"
NAMES = ("sample", *PUBLISHED, "kaggle")


_DRIVE_HOSTS = frozenset({"drive.google.com", "docs.google.com", "drive.usercontent.google.com"})


def is_drive_url(url: str) -> bool:
    """Says whether an address is one of Google Drive."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.hostname in _DRIVE_HOSTS


def is_named(dataset: str) -> bool:
    """Says whether `dataset` is the name of a data set, neither a path nor an address."""
    return dataset in NAMES or dataset.startswith("tfds:")
