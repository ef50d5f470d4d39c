"""The data formats a site file can name.

A new format is one file, its name in `Data`, and a line in `guess_format`.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from client.data.image_folder import ImageFolder
from client.data.manifest import Manifest
from client.data.npz import Npz
from common.errors import SiteError

Data = Annotated[ImageFolder | Manifest | Npz, Field(discriminator="format")]


def guess_format(place: Path) -> Data:
    """The format of a bare folder or file, by what is there.

    Raises:
      SiteError: nothing there that a format knows.
    """
    archives = [place] if place.suffix == ".npz" else sorted(place.glob("*.npz"))
    if len(archives) == 1 and archives[0].is_file():
        return Npz(root=archives[0])
    if (place / "manifest.csv").is_file():
        return Manifest(root=place)
    if place.is_dir() and any(p.is_dir() and not p.name.startswith(".") for p in place.iterdir()):
        return ImageFolder(root=place)
    expected = "one .npz file, a folder with a manifest.csv, or a folder with a subfolder per class"
    got = "something else" if place.exists() else "nothing there"
    remedy = "Is the path right? Otherwise describe the data in a site file."
    raise SiteError(place, expected=expected, got=got, remedy=remedy)
