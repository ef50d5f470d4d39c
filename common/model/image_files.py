"""Which files are taken for images; needs nothing that is slow to import."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from common.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".pgm", ".ppm"}
)


@dataclass(frozen=True)
class Listing:
    """The files in a folder and those below it.

    Attributes:
      images: Those whose suffix is an image's, sorted.
      others: How many there are of each other kind.
    """

    images: list[Path]
    others: Counter[str]


def list_files(folder: Path) -> Listing:
    """List every file in a folder and those below it; links to folders count, and are not followed.

    Raises:
      DataError: no file is an image.
      OSError: a folder cannot be read.
    """
    found = sorted(_walk(folder))
    images = [path for path in found if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    others = Counter(_name_kind(path) for path in set(found).difference(images))
    if not images:
        raise DataError(folder, expected="a folder with images", got=count_kinds(others) or "none")
    return Listing(images, others)


def find_images(folder: Path) -> list[Path]:
    """Every image in a folder and those below it, sorted; raises `DataError` if there is none."""
    return list_files(folder).images


def _walk(folder: Path) -> Iterator[Path]:
    """Every file and every link below a folder."""

    def stop(error: OSError) -> NoReturn:
        raise error

    for place, folders, names in os.walk(folder, onerror=stop):
        yield from (Path(place, name) for name in names)
        yield from (link for name in folders if (link := Path(place, name)).is_symlink())


def _name_kind(path: Path) -> str:
    return "linked folder" if path.is_dir() else path.suffix.lower() or "without suffix"


def count_kinds(kinds: Counter[str]) -> str:
    """Such as `3 .txt, 1 .json`, the most frequent first; empty if there are none."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
