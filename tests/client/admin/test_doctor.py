"""A hospital from nothing to its coordinator: what `init` writes, and what `check` finds."""

import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.cli import main as cli
from client.site import Site
from common.config.yaml import dump
from common.flower.compat import VERSION
from common.support import keys
from server.link.sites import Sites
from server.project import certificates
from server.project.project import Project
from simulations.demo.loopback import find_free_port
from tests.builders import DEMO, edit_site
from tests.processes import link_up

Command = Callable[..., tuple[int, str]]
FLAGS = ("--name", "west", "--server", "localhost:4443")
OPENLY = "--no-privacy"


@pytest.fixture
def command(
    run_main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Runs `consilium-client` in an empty folder, with what is typed: exit code, all it printed."""
    monkeypatch.chdir(tmp_path)
    # What it prints must be one line each, however wide the terminal is.
    monkeypatch.setattr("common.support.terminal.console._width", 500)
    return partial(run_main, cli.main)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A coordinator's, served by a thread."""
    folder = tmp_path_factory.mktemp("coordinator") / "project"
    made = Project.create(folder, ("localhost",), find_free_port())
    with link_up(made):
        yield made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- init ---


def test_init_by_flags(command: Command, phantoms: Path, tmp_path: Path) -> None:
    options = (*FLAGS, "--data", phantoms / "west", "--enrolled-patients", "120")
    code, text = command("init", "here/site.yaml", *options, "--weights", "nets", "--yes")
    assert code == 0, text
    here = tmp_path / "here"
    found = {path.name for path in here.iterdir()}
    assert found >= {"site.yaml", "site.key", "site.pub"}
    site = Site.read(here / "site.yaml")
    assert (site.name, site.data.format) == ("west", "manifest")
    assert site.data.root == phantoms / "west"
    assert site.data.enrolled_patients == 120
    assert site.state == here.resolve() / "state"
    assert site.weights == tmp_path / "nets"
    (connect,) = site.connect
    assert connect.server == "localhost:4443"
    assert (connect.ca, connect.key) == (here / "ca.crt", here / "site.key")
    assert mode(here / "site.key") == 0o600
    private = keys.read_private(here / "site.key")
    public = keys.read_public(here / "site.pub")
    assert keys.pem(public) == keys.pem(private.public_key())
    assert f"fingerprint  {keys.fingerprint(public)}\n" in text
    assert "consilium-server admit site.pub --name west\n" in text
    assert "PRIVATE" not in text
    assert all(isinstance(key, str) for key in yaml.safe_load((here / "site.yaml").read_text()))


@pytest.mark.parametrize(
    ("enrolled", "delta"), [(1, 1e-3), (120, 8e-4), (500, 2e-4), (1000, 1e-4), (7777, 1e-5)]
)
def test_what_init_writes_is_active_and_strict(
    command: Command, phantoms: Path, tmp_path: Path, enrolled: int, delta: float
) -> None:
    options = (*FLAGS, "--data", phantoms / "west", "--enrolled-patients", enrolled, "--yes")
    code, text = command("init", "site.yaml", *options)
    assert code == 0, text
    policy = Site.read(tmp_path / "site.yaml").policy
    assert policy.model_dump(exclude_none=True, exclude={"disclose"}) == {
        "approve": "ask",
        "require_privacy": True,
        "max_epsilon": 8.0,
        "delta": delta,
        "min_patients": 20,
        "min_images": 50,
        "max_holdout": 0.4,
        "max_studies": 4,
        "unfreeze": ("head",),
    }
    assert delta <= 1 / (10 * enrolled)
    assert (policy.disclose.counts, policy.disclose.metrics) == ("rounded", "final")
    lines = (tmp_path / "site.yaml").read_text().splitlines()
    begin, end = (
        lines.index("policy:"),
        lines.index("# The coordinator, and this site's own key, which never leaves this machine."),
    )
    told = [line for line in lines[begin + 1 : end - 1] if not line.endswith(":")]
    assert all(" # " in line for line in told)
    assert len(told) == 10


def test_a_hospital_may_do_without_privacy(
    command: Command, phantoms: Path, tmp_path: Path
) -> None:
    options = (*FLAGS, "--data", phantoms / "west", "--no-privacy")
    code, text = command("init", "site.yaml", *options)
    assert code == 0, text
    policy = Site.read(tmp_path / "site.yaml").policy
    assert (policy.approve, policy.require_privacy, policy.min_images) == ("ask", False, 50)


def test_init_asks_for_the_rest(command: Command, phantoms: Path, tmp_path: Path) -> None:
    typed = f"east\n{phantoms / 'east'}\nlocalhost:443\n\n3\nmany\n600\n"
    code, text = command("init", "site.yaml", typed=typed)
    assert code == 0, text
    site = Site.read(tmp_path / "site.yaml")
    assert (site.name, site.data.root) == ("east", phantoms / "east")
    assert site.data.enrolled_patients == 600
    assert (site.policy.max_epsilon, site.policy.delta) == (3.0, 1e-4)
    (tmp_path / "site.yaml").unlink()
    command("init", "site.yaml", typed=f"east\n{phantoms / 'east'}\nlocalhost:443\nn\n")
    assert not Site.read(tmp_path / "site.yaml").policy.require_privacy
    (tmp_path / "site.yaml").unlink()
    assert command("init", "site.yaml", typed="east\n")[0] == 130
    assert not (tmp_path / "site.yaml").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--data", "nowhere"), "nothing there"),
        (("--data", ".", "--format", "dicom"), "expected 'image_folder', 'manifest', 'npz'"),
        (("--data", ".", "--format", "manifest", "--server", "localhost"), "expected host:port"),
        (("--data", ".", "--format", "manifest", "--name", "St. Mary's"), "site.yaml: name"),
    ],
)
def test_wrong_answers_leave_nothing(
    options: tuple[str, ...], expected: str, command: Command, tmp_path: Path
) -> None:
    code, text = command("init", "site.yaml", *FLAGS, *options, OPENLY)
    assert code == 1
    assert expected in text
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced(command: Command, phantoms: Path, tmp_path: Path) -> None:
    options = (*FLAGS, "--data", phantoms / "west", OPENLY)
    command("init", "site.yaml", *options)
    path, key = tmp_path / "site.yaml", tmp_path / "site.key"
    path.write_text(path.read_text() + "device: cpu\n")
    before = path.read_bytes(), key.read_bytes()
    (tmp_path / "site.pub").unlink()
    code, text = command("init", "site.yaml", *options)
    assert code == 0
    assert "is there already, and stays as it is" in text
    assert (path.read_bytes(), key.read_bytes()) == before
    assert keys.read_public(tmp_path / "site.pub") == keys.read_private(key).public_key()
    key.write_text("not a key")
    key.chmod(0o600)
    code, text = command("init", "site.yaml", *options)
    assert code == 1
    assert "site.key: expected a private key" in text
    assert key.read_text() == "not a key"


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="systemd")
def test_its_unit_is_one(command: Command, phantoms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b%c"
    command("init", folder / "site.yaml", *FLAGS, "--data", phantoms / "west", OPENLY)
    unit = folder / "consilium-client.service"
    text = unit.read_text()
    assert f'start "{folder}/site.yaml"'.replace("%", "%%") in text
    for line in ("Restart=always", "RestartSec=10", "KillMode=control-group", "UMask=0077"):
        assert f"\n{line}\n" in text
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    text = text.replace(str(Path(sys.executable).with_name("consilium-client")), "/bin/true")
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert "consilium-client.service" not in done.stderr, done.stderr


# --- check ---


def settled(command: Command, project: Project, phantoms: Path, **changes: Any) -> Path:
    """A hospital that `init` made, admitted."""
    server_ = f"localhost:{project.settings.port}"
    options = ("--name", "west", "--server", server_, "--data", phantoms / "west", OPENLY)
    command("init", "site.yaml", *options)
    path = Path("site.yaml").resolve()
    shutil.copy(certificates.find_authority_file(project.folder), "ca.crt")
    Sites(project).admit(keys.read_public(Path("site.pub")), f"west-{time.monotonic_ns()}")
    return edit_site(path, **({"policy": {}} | changes))


def found(text: str) -> dict[str, tuple[bool, str]]:
    """What `check` said of each thing."""
    lines = [line for line in text.splitlines() if line[:2] in ("ok", "no")]
    assert len(lines) == len(text.splitlines()), text
    return {line[4:16].strip(): (line[:2] == "ok", line[17:]) for line in lines}


STUDY = {
    "name": "asked",
    "classes": ["clear", "nodule", "consolidation", "effusion"],
    "model": {"backbone": "shufflenet_v2_x0_5", "weights": "none"},
    "images": {"size": 32},
    "train": {"rounds": 3, "local_epochs": 1, "batch_size": 8},
}


@pytest.mark.system
def test_all_is_well(command: Command, project: Project, phantoms: Path) -> None:
    path = settled(command, project, phantoms)
    Path("study.yaml").write_text(dump(STUDY))
    for arguments in ((path,), (path, "study.yaml")):
        code, text = command("check", *arguments)
        assert code == 0, text
        said = found(text)
        assert all(good for good, _ in said.values())
    assert set(said) == {
        *("release", "site file", "state", "ledger", "study", "data", "images", "disk", "policy"),
        *("backbone", "key", "ca", "server", "certificate", "clocks", "its release", "admitted"),
    }
    authority = keys.read_certificate(certificates.find_authority_file(project.folder))
    assert keys.fingerprint(authority) in said["ca"][1]
    assert keys.fingerprint(keys.read_public(Path("site.pub"))) in said["key"][1]
    assert f"{certificates.read_expiry(project.folder):%Y-%m-%d}" in said["certificate"][1]
    assert said["its release"][1] == f"Consilium {VERSION}"
    assert not Sites(project).list_sites()[0].connected  # a look, no visit
    for row in (phantoms / "west/manifest.csv").read_text().splitlines()[1:]:
        image, patient = row.split(",")[0], row.split(",")[2]
        assert image not in text
        assert patient not in text.split()


@pytest.mark.system
def test_every_failure_is_said_and_none_hides_another(
    command: Command, project: Project, phantoms: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantoms / "west", data)
    path = settled(command, project, phantoms, data={"format": "manifest", "root": "data"})
    command("check", path)
    state = tmp_path / "state"
    state.chmod(0o755)
    (tmp_path / "site.key").chmod(0o644)
    images = [line.split(",")[0] for line in (data / "manifest.csv").read_text().splitlines()[1:]]
    (data / images[0]).write_bytes(b"no image")
    Path("study.yaml").write_text(dump(STUDY | {"classes": ["clear", "fracture"]}))
    code, text = command("check", path, "study.yaml")
    assert code == 1
    said = found(text)
    assert said["state"][1].endswith(f"chmod 700 {state}")
    assert "expected the study's classes clear, fracture" in said["data"][1]
    assert "expected a file closed to other users" in said["key"][1]
    bad = {what for what, (good, _) in said.items() if not good}
    assert bad == {"state", "data", "policy", "key", "server"}
    state.chmod(0o700)
    code, text = command("check", path)
    assert (code, found(text)["images"][0]) == (1, False)
    assert "in the data's order [1]" in text
    assert images[0] not in text
    (data / images[1]).unlink()
    assert "one that is not there in 1 row (line 3)" in found(command("check", path)[1])["data"][1]


@pytest.mark.system
def test_a_policy_that_says_no_and_a_broken_ledger(
    command: Command, project: Project, phantoms: Path, tmp_path: Path
) -> None:
    path = settled(command, project, phantoms, policy={"min_patients": 10_000})
    Path("study.yaml").write_text(dump(STUDY))
    code, text = command("check", path, "study.yaml")
    assert code == 1
    assert "expected at least 10000 training patients" in found(text)["policy"][1]
    (tmp_path / "state/ledger.jsonl").write_text("{}\n")
    assert "ledger-adopt" in found(command("check", path)[1])["ledger"][1]
    Path("study.yaml").write_text(dump(STUDY | {"model": {"backbone": "resnet19"}}))
    assert "resnet18" in found(command("check", path, "study.yaml")[1])["backbone"][1]
    Path("study.yaml").write_text(dump(STUDY | {"train": {}}))
    said = found(command("check", path, "study.yaml")[1])
    assert (said["study"][0], said["data"][0]) == (False, True)
    code, text = command("check", tmp_path / "none.yaml")
    assert (code, set(found(text))) == (1, {"release", "site file"})


@pytest.mark.system
def test_what_is_wrong_with_the_connection(
    command: Command, project: Project, phantoms: Path, tmp_path: Path
) -> None:
    path = settled(command, project, phantoms)
    name = Sites(project).list_sites()[-1].name
    Sites(project).remove(name)
    said = found(command("check", path)[1])
    assert said["server"][0]
    assert "expected a key that the coordinator admitted" in said["admitted"][1]
    other = Project.create(tmp_path / "other", ("localhost",), 4443)
    shutil.copy(certificates.find_authority_file(other.folder), tmp_path / "ca.crt")
    said = found(command("check", path)[1])
    assert "compare fingerprints by telephone" in said["server"][1]
    assert "admitted" not in said
    (tmp_path / "ca.crt").write_text("nothing")
    said = found(command("check", path)[1])
    assert (said["ca"][0], said["server"][0]) == (False, False)
    content = yaml.safe_load(path.read_text())
    del content["connect"]
    path.write_text(dump(content))
    code, text = command("check", path)
    assert code == 1
    assert "connect: expected server, ca and key" in found(text)["server"][1]


def test_what_bfloat16_would_gain_is_measured_on_request(
    command: Command, phantoms: Path, tmp_path: Path
) -> None:
    data = {"format": "manifest", "root": str(phantoms / "west")}
    (tmp_path / "site.yaml").write_text(dump({"name": "w", "data": data, "state": "state"}))
    assert "beside float32" not in command("check", "site.yaml", DEMO)[1]
    told = command("check", "site.yaml", DEMO, "--speed")[1]
    assert "\nok  speed        bfloat16 beside float32: frozen layers × " in told
    code, text = command("check", "site.yaml", "--speed")
    assert code == 2
    assert "name the study too" in text
