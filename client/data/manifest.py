"""A CSV file that lists the images: columns `image`, `label`, `patient`, and perhaps `split`."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from client.data.records import FileImage, Format, Part, Row
from common.errors import DataError

REQUIRED = ("image", "label", "patient")
SPLITS: dict[str, Part | None] = {
    "": None,
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}

Cells = dict[str, str]


class Manifest(Format):
    """Images named, relative to `root`, by the rows of a UTF-8 CSV file with a header.

    Attributes:
      manifest: the CSV file, relative to `root`.
    """

    format: Literal["manifest"] = "manifest"
    manifest: str = "manifest.csv"

    @property
    def file(self) -> Path:
        """The CSV file."""
        return self.root / self.manifest

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Every row of the manifest, in its order."""
        lines = self._lines()
        for column in REQUIRED:
            empty = [line for line, cells in lines.items() if not cells[column]]
            self._refuse(empty, f"a value in column {column!r}", "an empty one")
        splits = ", ".join(filter(None, SPLITS))
        odd = [line for line, cells in lines.items() if cells.get("split", "") not in SPLITS]
        self._refuse(odd, f"{splits} or nothing in column 'split'", "another word")
        self._check_images({line: PurePosixPath(cells["image"]) for line, cells in lines.items()})
        return [self._row(cells) for cells in lines.values()]

    def _row(self, cells: Cells) -> Row:
        named = {*REQUIRED, "split"}
        return Row(
            image=FileImage(self.root / PurePosixPath(cells["image"])),
            label=cells["label"],
            patient=cells["patient"],
            split=SPLITS[cells.get("split", "")],
            columns={name: cell for name, cell in cells.items() if name not in named},
        )

    def _check_images(self, paths: dict[int, PurePosixPath]) -> None:
        outside = [n for n, path in paths.items() if path.is_absolute() or ".." in path.parts]
        self._refuse(outside, "image paths below the data's root", "one that leaves it")
        times = Counter(paths.values())
        repeated = [line for line, path in paths.items() if times[path] > 1]
        self._refuse(repeated, "every image once", "one listed again")
        missing = [line for line, path in paths.items() if not (self.root / path).is_file()]
        self._refuse(missing, f"images below {self.root}", "one that is not there")

    def _refuse(self, lines: Sequence[int], expected: str, got: str) -> None:
        """Raise a `DataError` about these lines of the file, if there are any."""
        if lines:
            shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
            rows = "1 row" if len(lines) == 1 else f"{len(lines)} rows"
            got = f"{got} in {rows} (line {shown})"
            raise DataError(self.file, expected=expected, got=got)

    def _lines(self) -> dict[int, Cells]:
        """Stripped cells by column name, by line number in the file."""
        try:
            with self.file.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                header = [name.strip() for name in next(reader, [])]
                self._check_header(header)
                found = [(reader.line_num, cells) for cells in reader if any(cells)]
        except (OSError, UnicodeDecodeError, csv.Error) as ex:
            reason = getattr(ex, "strerror", None) or str(ex)
            expected = "a readable UTF-8 CSV file"
            raise DataError(self.file, expected=expected, got=reason) from None
        ragged = [line for line, cells in found if len(cells) != len(header)]
        self._refuse(ragged, f"{len(header)} cells in each row", "another number")
        return {
            line: dict(zip(header, (cell.strip() for cell in cells), strict=True))
            for line, cells in found
        }

    def _check_header(self, header: list[str]) -> None:
        missing = [name for name in REQUIRED if name not in header]
        if missing or len(set(header)) != len(header):
            expected = f"columns {', '.join(REQUIRED)}, perhaps split, and others, each once"
            got = ", ".join(header) or "an empty file"
            remedy = f"Missing: {', '.join(missing)}." if missing else ""
            raise DataError(self.file, expected=expected, got=got, remedy=remedy)
