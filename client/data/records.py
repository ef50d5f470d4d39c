"""Records: what every data format comes down to. One image, its label, its patient."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StrictInt

from common.config.yaml import Section
from common.errors import DataError

if TYPE_CHECKING:  # reading a site file must not load torch
    from torch import Tensor

    from common.model.images import Preprocess

Part = Literal["train", "validation", "test"]


class Image(Protocol):
    """An image that is read when asked for, and not kept."""

    @property
    def name(self) -> str:
        """What errors call it, on this machine only."""

    def digest(self) -> str:
        """SHA-256 of the content, hex: the same under any name."""

    def square(self, preprocess: "Preprocess") -> "Tensor":
        """uint8 [3, crop, crop]; a `DataError` names the image if it cannot be read."""


@dataclass(frozen=True)
class FileImage:
    """An image file."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def digest(self) -> str:
        """SHA-256 of the file's bytes."""
        return hashlib.sha256(self._read()).hexdigest()

    def square(self, preprocess: "Preprocess") -> "Tensor":
        """uint8 [3, crop, crop]."""
        return preprocess.read(self._read(), self.name)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as ex:
            expected = "a readable image"
            raise DataError(self.name, expected=expected, got=ex.strerror) from None


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """An image already in memory: uint8, grey [H, W] or RGB [H, W, 3]."""

    array: NDArray[np.uint8]
    name: str

    def digest(self) -> str:
        """SHA-256 of shape and pixels."""
        shape = repr(self.array.shape).encode()
        return hashlib.sha256(shape + self.array.tobytes()).hexdigest()

    def square(self, preprocess: "Preprocess") -> "Tensor":
        """uint8 [3, crop, crop]."""
        import torch

        array = self.array if self.array.ndim == 3 else self.array[..., None]
        rgb = np.broadcast_to(array, (*array.shape[:2], 3))
        return preprocess.pixels(torch.from_numpy(rgb.copy()).permute(2, 0, 1))


@dataclass(frozen=True)
class Record:
    """One labelled image of one patient.

    Attributes:
      image: where the pixels come from.
      label: position of its class in the study's classes.
      patient: the hospital's own id; never leaves the machine.
      split: the part the data itself puts it in, if any.
      columns: whatever else the data says, by name.
    """

    image: Image
    label: int
    patient: str
    split: Part | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A record as a format finds it, before its label is looked up in the study's classes."""

    image: Image
    label: str
    patient: str
    split: Part | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


class Format(Section):
    """A data format: its keys in the site file, and how to list what is there.

    Attributes:
      root: where the data is.
      patients: a text file with one patient id a line; without it, all patients are used.
      enrolled_patients: about how many patients train here: a number of the hospital's own, so that
        nothing it sends depends on the exact one. Needed for studies with privacy.
    """

    root: Path
    patients: Path | None = None
    enrolled_patients: Annotated[StrictInt, Field(ge=1)] | None = None

    def records(self, classes: Sequence[str]) -> list[Record]:
        """All records of the used patients, in a fixed order, no image decoded.

        Args:
          classes: the study's classes, in order.

        Raises:
          DataError: nothing there, a label outside `classes`, or a problem with the format.
        """
        rows = self.rows(classes)
        if torn := sum("\n" in row.patient or "\r" in row.patient for row in rows):
            where, got = f"{self.root}: patients", f"{torn} rows whose id has a line break"
            remedy = "Give these patients ids of one line."
            raise DataError(where, expected="ids of one line", got=got, remedy=remedy)
        if self.patients is not None:
            used = _listed(self.patients)
            rows = [row for row in rows if row.patient in used]
        if not rows:
            got = "none" if self.patients is None else f"none of the patients in {self.patients}"
            raise DataError(self.root, expected="labelled images", got=got)
        position = {name: index for index, name in enumerate(classes)}
        unknown = Counter(row.label for row in rows if row.label not in position)
        if unknown:
            raise self._unknown(unknown, classes)
        return [
            Record(row.image, position[row.label], row.patient, row.split, row.columns)
            for row in rows
        ]

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """What the format finds, in a fixed order; labels need not be among `classes`."""
        raise NotImplementedError

    def _unknown(self, unknown: Counter[str], classes: Sequence[str]) -> DataError:
        got = ", ".join(f"{label!r} ({count})" for label, count in sorted(unknown.items()))
        return DataError(
            f"{self.root}: labels",
            expected=f"the study's classes {', '.join(classes)}",
            got=got,
            remedy="Rename these labels, remove their images, or ask for a study with them.",
        )


def _listed(path: Path) -> set[str]:
    """The patient ids in a text file, one a line."""
    try:
        # Not splitlines: an id may hold what Unicode takes for the end of a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as ex:
        reason = getattr(ex, "strerror", None) or "not UTF-8 text"
        expected = "a text file with one patient id a line"
        raise DataError(path, expected=expected, got=reason) from None
    return {line.strip() for line in lines if line.strip()}
