"""A hospital's first files: its site file, its key, and what starts it with the machine."""

import getpass
import shlex
import sys
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context, Decimal
from pathlib import Path
from typing import Any

import yaml

from client.data.registry import guess_format
from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import MOST_DELTA
from common.errors import SiteError
from common.support import files, keys
from common.support.systemd import quoted

UNIT = "consilium-client.service"

_SITE = """\
# What {name} says about itself, here and to nobody else. Paths are relative to this file.
{named}

# The images. patients: a file with one id a line would use only these.
{data}
# enrolled_patients, in data: about how many patients train here; studies with privacy need it.

# A folder of this site's own: its secret, its ledger, prepared images. Never in two places at once;
# secret, ledger.jsonl and ledger.head belong into the backup.
{state}
{weights}

# What this site agrees to, whoever asks; a study that asks for more is refused.
policy:
  approve: ask # each study waits for consilium-client approve; policy: the keys below decide alone
{privacy}
  min_patients: 20 # refuse to train on fewer training patients
  max_holdout: 0.4 # largest share of patients that a study may keep from training, to test on
  max_studies: 4 # new studies in 30 days: whether a site takes part tells a little, each time
  unfreeze: [head] # what may train, and so leave; the deeper (last:1, last:2), the more it can tell
  disclose:
    counts: rounded # numbers of patients and images, in tens; or exact, or none
    metrics: final # how well models do here, told at the end alone; or every_round, or none

# The coordinator, and this site's own key, which never leaves this machine.
{connect}
"""

_PRIVATE = """\
  require_privacy: true # refuse studies without differential privacy
  max_epsilon: {epsilon:g} # of all studies together: the smaller, the less they tell of any patient
  delta: {delta:.1e} # the chance that this fails; at most a tenth of 1 / enrolled_patients"""

_OPEN = """\
  require_privacy: false # true: only studies with differential privacy; needs max_epsilon, delta
  min_images: 50 # refuse rounds of fewer training images: what they send would tell each of them"""

_SERVICE = """\
# sudo cp {unit} /etc/systemd/system/ && sudo systemctl enable --now {name}
[Unit]
Description=Consilium at {site}
Wants=network-online.target
After=network-online.target

[Service]
User={user}
ExecStart={command} start {file}
Restart=always
RestartSec=10
KillMode=control-group
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full
ProtectControlGroups=yes
ProtectKernelTunables=yes
RestrictSUIDSGID=yes
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What only the hospital knows.

    Attributes:
      name: Of the site, as the coordinator will admit it.
      data: The folder or file with its images.
      format: Of the data; by default the one that it looks like.
      state: Its private folder.
      server: The coordinator's `host:port`.
      ca: The certificate that the coordinator gave out; it may come later.
      enrolled: About how many patients train there.
      epsilon: What all studies together may spend; None if they need no differential privacy.
      weights: Its folder of backbone weights.
    """

    name: str
    data: Path
    format: str | None
    state: Path
    server: str
    ca: Path
    enrolled: int | None
    epsilon: float | None
    weights: Path | None


def write_site(path: Path, answers: Answers) -> None:
    """Write a new site file; nothing is written unless it is right.

    Raises:
      SiteError: there is one already, an answer is wrong, or the data has no known format.
    """
    if path.exists():
        expected, remedy = "no such file yet", "Edit it, or choose another name."
        raise SiteError(path, expected=expected, got="one", remedy=remedy)
    text = _site(path, answers)
    Site.parse(yaml.safe_load(text), str(path), SiteError)
    with explain_disk_errors(path, SiteError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.create(path, text)


def _site(path: Path, answers: Answers) -> str:
    home = path.resolve().parent
    place = answers.data.expanduser()
    data: dict[str, Any] = {"format": answers.format or guess_format(place).format}
    data["root"] = _from(home, place)
    if answers.enrolled is not None:
        data["enrolled_patients"] = answers.enrolled
    weights = _from(home, answers.weights) if answers.weights else None
    ca = _from(home, answers.ca)
    connect = {"server": answers.server, "ca": ca, "key": key_of(path).name}
    return _SITE.format(
        name=answers.name,
        named=_line("name", answers.name),
        data=_line("data", data),
        state=_line("state", _from(home, answers.state)),
        weights=_line("weights", weights) if weights else "# weights: a folder of backbone files",
        connect=_line("connect", connect),
        privacy=_privacy(answers.epsilon, answers.enrolled),
    )


def _privacy(epsilon: float | None, enrolled: int | None) -> str:
    if epsilon is None:
        return _OPEN
    if enrolled is None:
        expected, remedy = "how many patients train here, for δ", "Say --enrolled-patients."
        raise SiteError("--enrolled-patients", expected=expected, got="nothing", remedy=remedy)
    tenth = Context(prec=1, rounding=ROUND_DOWN).divide(1, 10 * enrolled)
    delta = min(tenth, Decimal(str(MOST_DELTA)))
    return _PRIVATE.format(epsilon=epsilon, delta=delta)


def _line(key: str, value: object) -> str:
    """YAML on one line."""
    flow: str = yaml.safe_dump(
        {key: value}, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6
    )
    return flow.strip()[1:-1]


def _from(home: Path, path: Path) -> str:
    """A path as a site file in `home` has it."""
    whole = path.expanduser().resolve()
    return str(whole.relative_to(home) if whole.is_relative_to(home) else whole)


def key_of(site_file: Path) -> Path:
    """Where the key goes that is made with a site file."""
    return site_file.with_suffix(".key")


def write_keys(site_file: Path) -> tuple[Path, keys.PublicKey]:
    """The public half of the site's key, and its file; the key is made unless there is one.

    Raises:
      LinkError: there is one that cannot be used; it is never replaced.
    """
    private, public = key_of(site_file), site_file.with_suffix(".pub")
    with explain_disk_errors(private, SiteError):
        if not private.exists():
            keys.write_private(private, keys.new())
        key = keys.read_private(private).public_key()
        files.write(public, keys.pem(key))
    return public, key


def write_unit(site_file: Path, name: str) -> Path | None:
    """Write what has systemd start the node with the machine; None where there is no systemd."""
    if sys.platform != "linux":
        return None
    path = site_file.with_name(UNIT)
    text = _SERVICE.format(
        unit=shlex.quote(str(path.resolve())),
        name=Path(UNIT).stem,
        site=name,
        user=getpass.getuser(),
        command=quoted(Path(sys.executable).with_name("consilium-client")),
        file=quoted(site_file.resolve()),
    )
    with explain_disk_errors(path, SiteError):
        files.write(path, text)
    return path
