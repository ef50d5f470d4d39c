"""The site: what one hospital says about itself in its `site.yaml`. It always wins."""

import os
import secrets
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StrictInt

from client.data.formats import Data
from client.disk import usable
from common import files
from common.errors import SiteError, complaint
from common.study import Name, Unfreeze
from common.yaml import Section, YamlFile


class Policy(Section):
    """What this hospital agrees to; a study that asks for more is refused."""

    require_privacy: bool = False
    """Refuse studies without differential privacy."""
    min_patients: Annotated[StrictInt, Field(ge=1)] = 1
    """Refuse to train on fewer training patients."""
    unfreeze: tuple[Unfreeze, ...] | None = None
    """The depths allowed; without it, any."""


class Site(YamlFile):
    """One hospital."""

    name: Name
    data: Data
    state: Path
    """Private folder (mode 0700): the site's secret and the studies it joined."""
    cache: Path | None = None
    """Folder for prepared images, which are patient data; by default inside `state`."""
    weights: Path | None = None
    """Folder that holds backbone weights files."""
    role: Literal["train", "evaluate"] = "train"
    """`evaluate`: never trains; all of its patients are test patients."""
    policy: Policy = Policy()
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @classmethod
    def read(cls, path: Path) -> Self:
        """The site in `path`; relative paths in it are relative to it.

        Raises:
          SiteError: naming file, key, what was expected, and the nearest valid name.
        """
        return cls.load(path, SiteError).anchored(path.resolve().parent)

    @property
    def cache_folder(self) -> Path:
        """Where prepared images are kept; inside `state`, made on demand."""
        return self.cache or self.private("cache")

    def private(self, *parts: str) -> Path:
        """A folder under `state`, made on demand, readable by this user alone.

        Raises:
          SiteError: it cannot be made, or `state` was open to others before.
        """
        folder, where = self.state, f"{self.source}: state"
        with usable(where, SiteError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            rights = folder.stat().st_mode & 0o777
            if os.name == "posix" and rights & 0o077:
                expected, remedy = "a folder closed to other users", f"chmod 700 {folder}"
                got = f"mode {rights:03o}"
                raise SiteError(complaint(where, expected=expected, got=got, remedy=remedy))
            for part in parts:  # one by one: mkdir(parents=True) leaves the parents open to others
                folder = folder / part
                folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def secret(self) -> bytes:
        """256 bits that key the holdout; drawn once from the operating system.

        Raises:
          SiteError: the file cannot be made or read, or does not hold 256 bits.
        """
        path = self.private() / "secret"
        with usable(path, SiteError):
            if not path.exists():
                files.create(path, secrets.token_bytes(32), mode=0o600)
            secret = path.read_bytes()
        if len(secret) != 32:
            remedy = "Restore it from a backup: a new secret holds out other patients."
            got = f"{len(secret)} bytes"
            raise SiteError(complaint(path, expected="32 bytes", got=got, remedy=remedy))
        return secret
