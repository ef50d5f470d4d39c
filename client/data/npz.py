"""One NumPy archive in the layout of MedMNIST (Yang et al., Scientific Data 10:41, 2023)."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.data.records import ArrayImage, Format, Part, Row
from common.errors import DataError

SPLITS: dict[str, Part] = {"train": "train", "val": "validation", "test": "test"}
LAYOUT = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]


class Npz(Format):
    """`root` is an .npz file with `{train,val,test}_{images,labels}`.

    Images are uint8, [n, H, W] grey or [n, H, W, 3] RGB. Labels are integers, [n] or [n, 1]: the
    position in the study's classes. Each image is its own patient, named `<split>-<index>`.
    """

    format: Literal["npz"] = "npz"

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Train, validation, test, each in its order."""
        arrays = self._load()
        return [row for split in SPLITS for row in self._split(arrays, split, classes)]

    def _split(
        self, arrays: Mapping[str, NDArray[Any]], split: str, classes: Sequence[str]
    ) -> list[Row]:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        self._check(split, images, labels)
        names = dict(enumerate(classes))
        return [
            Row(
                image=ArrayImage(image, f"{self.root}: {split}_images[{index}]"),
                label=names.get(int(label), f"number {label}"),
                patient=f"{split}-{index}",
                split=SPLITS[split],
            )
            for index, (image, label) in enumerate(zip(images, labels.reshape(-1), strict=True))
        ]

    def _check(self, split: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
        grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
        if images.dtype != np.uint8 or not grey_or_rgb or 0 in images.shape[1:]:
            expected = "uint8 images [n, H, W] or [n, H, W, 3]"
            raise self._wrong(f"{split}_images", expected, images)
        if labels.dtype.kind not in "ui" or labels.shape not in [(len(images),), (len(images), 1)]:
            expected = f"{len(images)} integer labels, one per image"
            raise self._wrong(f"{split}_labels", expected, labels)

    def _wrong(self, key: str, expected: str, array: NDArray[Any]) -> DataError:
        got = f"{array.dtype} {list(array.shape)}"
        return DataError(f"{self.root}: {key}", expected=expected, got=got)

    def _load(self) -> dict[str, NDArray[Any]]:
        expected = f"an .npz archive with {', '.join(LAYOUT)}"
        try:
            stat = self.root.stat()
            return _arrays(self.root, stat.st_size, stat.st_mtime_ns)
        except KeyError:
            got = "others only"
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as ex:
            got = getattr(ex, "strerror", None) or str(ex)
        raise DataError(self.root, expected=expected, got=got)


@lru_cache(maxsize=1)
def _arrays(path: Path, _size: int, _modified: int) -> dict[str, NDArray[Any]]:
    """The arrays, read only, of a file in this state: one copy for all virtual sites of a pool."""
    # Opened as a zip archive, a lone .npy or a pickle is refused before it is read.
    with path.open("rb") as file, np.lib.npyio.NpzFile(file) as archive:
        arrays = {key: np.asarray(archive[key]) for key in LAYOUT}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays
