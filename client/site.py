"""The site: what one hospital says about itself in its `site.yaml`. It always wins."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, field_validator, model_validator

from client.data.registry import Data
from client.storage import explain_disk_errors, read_site_secret
from common.config.study import Delta, Epsilon, Name, Number, Sha256, Unfreeze, Word
from common.config.yaml import Section, YamlFile
from common.errors import SiteError
from common.protocol.disclosure import Disclosure
from common.support import files

Keep = Literal["auto", "activations", "images"]
"""What a site may ask to be kept of an image; `auto` is what pays."""
AtLeastOne = Annotated[StrictInt, Field(ge=1)]
Share = Annotated[Number, Field(ge=0, le=1)]


def _map_names(given: object) -> object:
    if not isinstance(given, list | tuple | dict):
        raise ValueError(f"expected a list of names, or names with their SHA-256, got {given!r}")
    return given if isinstance(given, dict) else dict.fromkeys(given)


Backbones = Annotated[dict[Word, Sha256 | None], BeforeValidator(_map_names)]
"""Names of backbones, each with the SHA-256 of the file of its weights; None for any weights."""


class Policy(Section):
    """What this hospital agrees to; a study that asks for more is refused.

    What a site file leaves out is as it stands here: nothing that tells of few is open by accident.
    """

    approve: Literal["ask", "policy"] = "ask"
    """`ask`: each study waits until a person approves it; `policy`: the keys below decide alone."""
    require_privacy: bool = False
    """Refuse studies without differential privacy."""
    max_epsilon: Epsilon | None = None
    """Most that all studies together may spend; one without privacy has no ε, and is refused."""
    delta: Delta | None = None
    """Refuse a larger δ; the δ of `max_epsilon`, which means nothing without one."""
    min_patients: AtLeastOne = 1
    """Refuse to train on fewer training patients; where numbers are told rounded, on up to a base
    more, as the site's secret has it: no patient's presence decides but in one of base sites."""
    min_images: AtLeastOne = 50
    """Without privacy, refuse rounds of fewer training images: their reply would tell each."""
    max_holdout: Share = 0.5
    """Largest share of its patients that a study may hold out, validation and test together."""
    max_studies: AtLeastOne | None = 4
    """New studies within 30 days, those refused for what the data are too; None for any number."""
    backbones: Backbones | None = None
    """The backbones allowed, with any weights or those of a SHA-256; without it, any."""
    unfreeze: tuple[Unfreeze, ...] | None = None
    """The depths allowed; without it, any."""
    max_local_epochs: AtLeastOne | None = None
    """Refuse longer rounds, also where the study counts them in steps."""
    max_local_steps: AtLeastOne | None = None
    """Refuse longer rounds, also where the study counts them in epochs."""
    max_batch_size: AtLeastOne | None = None
    disclose: Disclosure = Disclosure()
    """What leaves beside trained tensors."""

    @model_validator(mode="after")
    def _epsilon_has_its_delta(self) -> Self:
        if self.require_privacy and self.max_epsilon is None:
            raise ValueError("expected max_epsilon beside require_privacy, got none: any ε passes")
        if self.max_epsilon is not None and self.delta is None:
            raise ValueError("expected delta beside max_epsilon, got none. Write delta: 1.0e-5.")
        if self.disclose.epsilon is not None and self.delta is None:
            remedy = "Write delta: 1.0e-5."
            raise ValueError(f"expected delta beside disclose.epsilon, got none. {remedy}")
        return self


class Cache(Section):
    """Prepared images, which are patient data: where they are kept, how many, how long."""

    folder: Path | None = None
    """By default inside `state`."""
    limit_gb: Annotated[float, Field(strict=True, gt=0)] | None = None
    """Room for them, in 10⁹ bytes; beyond it, those used longest ago are deleted."""
    days: Annotated[StrictInt, Field(ge=1)] | None = None
    """Those that no study has used for so many days are deleted."""

    @property
    def limit(self) -> int | None:
        """`limit_gb` in bytes."""
        return None if self.limit_gb is None else round(self.limit_gb * 1e9)


class Connect(Section):
    """Where the coordinator is, and who this site is to him."""

    server: str
    """`host:port`."""
    ca: Path
    """The certificate that he gave out; it vouches for his server."""
    key: Path
    """This site's own private key."""

    @field_validator("server")
    @classmethod
    def _is_host_and_port(cls, given: str) -> str:
        host, _, port = given.rpartition(":")
        numbered = re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16
        if not re.fullmatch(r"[A-Za-z0-9.-]+", host) or not numbered:
            raise ValueError(f"expected host:port, such as link.example.org:443, got {given!r}")
        return given

    @property
    def host(self) -> str:
        """Of the server."""
        return self.server.rpartition(":")[0]


class Site(YamlFile):
    """One hospital."""

    name: Name
    data: Data
    state: Path
    """Private folder (mode 0700): secret, ledger, outbox, what was agreed, logs."""
    cache: Cache = Cache()
    weights: Path | None = None
    """Folder that holds backbone weights files."""
    role: Literal["train", "evaluate"] = "train"
    """`evaluate`: never trains; all of its patients are test patients."""
    policy: Policy = Policy()
    connect: tuple[Connect, ...] = ()
    """One for each coordinator, all of them served on one ledger; not needed in a simulation."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    adapt: StrictBool = True
    """Whether a model is fitted to this site at the end of a study that asks for it."""
    threads: AtLeastOne = 1
    """Cores that a round computes on; how sums are split among them decides their last digits."""
    keep: Keep = "auto"
    """What is kept of an image; `auto` compares what activations cost and save."""

    @model_validator(mode="before")
    @classmethod
    def _precision_is_the_studys(cls, given: object) -> object:
        if isinstance(given, dict) and "precision" in given:
            remedy = "Remove it: the study says it for all of its sites, as model.precision."
            raise ValueError(f"expected no key precision, got {given['precision']!r}. {remedy}")
        return given

    @field_validator("connect", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, given: object) -> object:
        return [given] if isinstance(given, dict) else given

    @field_validator("connect")
    @classmethod
    def _each_server_is_named_once(cls, given: tuple[Connect, ...]) -> tuple[Connect, ...]:
        servers = [one.server for one in given]
        if len(set(servers)) < len(servers):
            raise ValueError(f"expected each server once, got {', '.join(servers)}")
        return given

    @field_validator("cache", mode="before")
    @classmethod
    def _cache_is_a_section(cls, given: object) -> object:
        if isinstance(given, str):
            remedy = f"Write cache: {{folder: {given}}}."
            raise ValueError(f"expected a mapping of keys to values, got {given!r}. {remedy}")
        return given

    @model_validator(mode="after")
    def _delta_protects_each(self) -> Self:
        delta, enrolled = self.policy.delta, self.data.enrolled_patients
        if delta is not None and enrolled is not None and delta > (most := 1 / (10 * enrolled)):
            expected = f"policy.delta of at most {most:g}, a tenth of 1 / enrolled_patients"
            remedy = f"Write delta: {10.0 ** math.floor(math.log10(most)):g}."
            raise ValueError(f"expected {expected} ({enrolled}), got {delta:g}. {remedy}")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """The site in `path`; relative paths in it are relative to it.

        Raises:
          SiteError: naming file, key, what was expected, and the nearest valid name.
        """
        return cls.load(path, SiteError).anchored(path.resolve().parent)

    @property
    def cache_folder(self) -> Path:
        """Where prepared images are kept; by default inside `state`; made on demand.

        Raises:
          SiteError: it cannot be made, or was open to others before.
        """
        folder = self.cache.folder
        if folder is None:
            return self.private("cache")
        where = f"{self.source}: cache.folder"
        with explain_disk_errors(where, SiteError):
            return files.make_private(folder, where, SiteError)

    def list_connections(self) -> tuple[Connect, ...]:
        """Where the coordinators are; raises `SiteError` if there is none."""
        if not self.connect:
            where, expected = f"{self.source}: connect", "server, ca and key"
            remedy = "consilium-client init shows how they are written."
            raise SiteError(where, expected=expected, got="nothing", remedy=remedy)
        return self.connect

    def find_link_folder(self, connect: Connect) -> Path:
        """What is kept of the exchange with one coordinator; made on demand."""
        return self.private("link", connect.server.replace(":", "-"))

    def private(self, *parts: str) -> Path:
        """A folder under `state`, made on demand, readable by this user alone.

        Raises:
          SiteError: it cannot be made, or `state` was open to others before.
        """
        folder, where = self.state, f"{self.source}: state"
        with explain_disk_errors(where, SiteError):
            files.make_private(folder, where, SiteError)
            for part in parts:  # one by one: mkdir(parents=True) leaves the parents open to others
                folder = files.make_private(folder / part, where, SiteError)
        return folder

    def secret(self) -> bytes:
        """256 bits that key the holdout and the ledger; drawn once from the operating system.

        Raises:
          SiteError: the file cannot be made or read, does not hold 256 bits, or was lost.
        """
        return read_site_secret(self.private())
