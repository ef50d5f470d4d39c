"""A folder per class: `root/<label>/…/<image>`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from client.data.records import FileImage, Format, Row
from common.errors import DataError
from common.model.image_files import SUFFIXES


class ImageFolder(Format):
    """Images in folders named by their label, at any depth below; other files are ignored.

    Attributes:
      patient: regular expression searched in an image's path below `root` (with `/`); its first
        group is the patient id. Without it the file's name less its suffix is: each image is a
        patient of its own, except that files of equal name, in whatever folders and even in
        those of two classes, are one patient.
    """

    format: Literal["image_folder"] = "image_folder"
    patient: str | None = None

    @field_validator("patient")
    @classmethod
    def _has_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as ex:
            raise ValueError(f"expected a regular expression, got {pattern!r}: {ex}") from None
        if not groups:
            raise ValueError(f"expected a group (…) that is the patient id, got {pattern!r}")
        return pattern

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Every image with a known suffix, sorted by path."""
        if not self.root.is_dir():
            expected = "a folder with one subfolder per class"
            raise DataError(self.root, expected=expected, got="no such folder")
        paths = sorted(self._images())
        patients = [self._patient(path) for path in paths]
        missing = [path for path, patient in zip(paths, patients, strict=True) if not patient]
        if missing:
            got = f"{len(missing)} without, such as {missing[0]}"
            expected = f"a patient id by {self.patient!r} in every path"
            raise DataError(self.root, expected=expected, got=got)
        return [
            Row(FileImage(self.root / path), path.parts[0], patient)
            for path, patient in zip(paths, patients, strict=True)
        ]

    def _images(self) -> Iterator[Path]:
        """Paths below root of the images inside a class folder, hidden ones left out."""
        for path in self.root.rglob("*"):
            inside = path.relative_to(self.root)
            hidden = any(part.startswith(".") for part in inside.parts)
            if path.suffix.lower() in SUFFIXES and len(inside.parts) > 1 and not hidden:
                yield inside

    def _patient(self, path: Path) -> str:
        if self.patient is None:
            return path.stem.strip()
        found = re.search(self.patient, path.as_posix())
        return (found[1] or "").strip() if found else ""
