"""The coordinator's project: one private folder with all that a deployment is."""

import getpass
import ipaddress
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field, StrictInt

from common.config.yaml import YamlFile, dump
from common.errors import ConsiliumError, LinkError
from common.support import files
from common.support.systemd import quoted
from server.project import certificates

HTTPS = 443
_SETTINGS = "coordinator.yaml"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"

_UNIT = """\
# sudo cp {unit} /etc/systemd/system/ && sudo systemctl enable --now consilium-server
[Unit]
Description=Consilium coordinator {host}
Wants=network-online.target
After=network-online.target

[Service]
User={user}
ExecStart={command} start --project {folder}
Restart=always
RestartSec=10
UMask=0077
LimitNOFILE=65536
AmbientCapabilities=CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={folder}

[Install]
WantedBy=multi-user.target
"""


def _host(text: str) -> str:
    """A name or an IPv4 address; hospitals write it into site.yaml."""
    number = text.rpartition(".")[2].isdigit()
    if re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", text) and len(text) < 254:
        if not number:
            return text
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            pass
    raise ValueError(f"expected a name or an IPv4 address, got {text!r}")


def _store(address: str) -> str:
    """Where MLflow keeps figures; it has given up folders."""
    if re.fullmatch(r"(https?://|sqlite:///)\S+", address):
        return address
    raise ValueError(f"expected http://…, https://… or sqlite:///FILE, got {address!r}")


Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[StrictInt, Field(ge=1, le=65535)]


class Settings(YamlFile):
    """`coordinator.yaml`."""

    hosts: Annotated[tuple[Host, ...], Field(min_length=1)]
    """Names and addresses by which hospitals reach this machine."""
    port: Port = HTTPS
    quota_gb: Annotated[float, Field(strict=True, gt=0)] = 20.0
    """Most that `link.db` may hold, in 10⁹ bytes; beyond it, no reply is taken."""
    mlflow: Annotated[str, AfterValidator(_store)] | None = None
    """The address of an MLflow server, or of a database, that is given the figures of each run."""

    @property
    def quota(self) -> int:
        """`quota_gb` in bytes."""
        return round(self.quota_gb * 1e9)


class RunState(NamedTuple):
    """The progress of one run."""

    name: str
    round: int
    rounds: int | None
    """None if its study cannot be read."""
    busy: bool
    """Whether a process is on it."""
    finished: bool


class Project:
    """A coordinator's folder.

    Args:
      folder: The folder that `create` made.
      settings: The content of `coordinator.yaml`.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    @classmethod
    def create(cls, folder: Path, hosts: tuple[str, ...], port: int) -> Self:
        """A new project, with an authority of its own.

        Raises:
          LinkError: the folder is not empty; nothing in it is touched.
        """
        settings = _settings(folder, {"hosts": hosts, "port": port})
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        if any(folder.iterdir()):
            expected, got = "a new or empty folder", "a project or other files"
            remedy = "A second authority would lock every hospital out; renew makes certificates."
            raise LinkError(folder, expected=expected, got=got, remedy=remedy)
        folder.chmod(0o700)
        project = cls(folder, settings)
        certificates.write_authority(folder, settings.hosts[0])
        certificates.write_server(folder, settings.hosts)
        project.runs.mkdir(mode=0o700)
        project._write_unit()
        project._write_settings()
        return project

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The project in a folder; raises `LinkError` if there is none, or others can read it."""
        folder = folder.resolve()
        if not (folder / _SETTINGS).is_file():
            remedy = "Name it by --project, or make one by consilium-server init."
            expected, got = "a coordinator's project", f"no {_SETTINGS} in it"
            raise LinkError(folder, expected=expected, got=got, remedy=remedy)
        files.check_private(folder, folder, LinkError)
        return cls(folder, Settings.load(folder / _SETTINGS, LinkError))

    def renew(self, hosts: tuple[str, ...], authority_key: Path | None = None) -> Self:
        """Make a new server key and certificate by the same authority, for these hosts too.

        Args:
          hosts: Beside those in `coordinator.yaml`.
          authority_key: Where `ca.key` is; by default in the folder.

        Raises:
          LinkError: the authority's key is not there, or is another's.
        """
        every = tuple(dict.fromkeys((*self.settings.hosts, *hosts)))
        content = self.settings.model_dump() | {"hosts": every}
        renewed = type(self)(self.folder, _settings(self.folder, content))
        certificates.write_server(self.folder, renewed.settings.hosts, None, authority_key)
        renewed._write_settings()
        return renewed

    @property
    def database(self) -> Path:
        """The database of the messages under way and of the admitted sites."""
        return self.folder / "link.db"

    @property
    def versions(self) -> Path:
        """The file with the software release that each site was last seen with."""
        return self.folder / "releases.json"

    @property
    def ledgers(self) -> Path:
        """The file of how far each site's ledger went when it last replied, in whatever run."""
        return self.folder / "ledgers.json"

    @property
    def runs(self) -> Path:
        """The folder that holds one folder for each run."""
        return self.folder / "runs"

    @property
    def log(self) -> Path:
        """The log of `consilium-server start`."""
        return self.folder / "coordinator.log"

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep other processes from doing the same; raises `LinkError` if one does it."""
        lock = FileLock(self.folder / f".{name}.lock", timeout=1, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            expected, got = f"no other consilium-server {name}", "one at work"
            raise LinkError(self.folder, expected=expected, got=got) from None
        try:
            yield
        finally:
            lock.release()

    def is_up(self) -> bool:
        """Whether `consilium-server start` runs."""
        return files.held(self.folder / ".start.lock")

    def list_runs(self) -> list[RunState]:
        """List every run, sorted by name."""
        return [_state(path.parent) for path in sorted(self.runs.glob("*/study.yaml"))]

    def _write_settings(self) -> None:
        content = dump(self.settings.model_dump(mode="json"))
        files.write(self.folder / _SETTINGS, content, mode=0o600)

    def _write_unit(self) -> None:
        unit = self.folder / "consilium-server.service"
        content = _UNIT.format(
            unit=unit,
            host=self.settings.hosts[0],
            user=getpass.getuser(),
            command=quoted(Path(sys.executable).with_name("consilium-server")),
            folder=quoted(self.folder),
        )
        files.write(unit, content, mode=0o600)


def _settings(folder: Path, content: dict[str, Any]) -> Settings:
    return Settings.parse(content, str(folder / _SETTINGS), LinkError)


def _state(folder: Path) -> RunState:
    from server.runs.run_folder import RunFolder

    try:
        rounds = RunFolder(folder).study.train.rounds
    except ConsiliumError:
        rounds = None
    try:
        last = int(json.loads((folder / "last.json").read_text("utf-8"))["round"])
    except (OSError, ValueError, KeyError):
        last = 0
    return RunState(
        name=folder.name,
        round=last,
        rounds=rounds,
        busy=RunFolder(folder).busy,
        finished=(folder / "report.json").is_file(),
    )
