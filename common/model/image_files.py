"""Which files are taken for images; needs nothing that is slow to import."""

from pathlib import Path

from common.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".pgm", ".ppm"}
)


def find_images(folder: Path) -> list[Path]:
    """Every image in a folder and those below it, sorted; raises `DataError` if there is none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(folder, expected="a folder with images", got="none")
    return paths
