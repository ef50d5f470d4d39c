"""The coordinator's folder: one authority for good, certificates that fit, keys with one name."""

import ipaddress
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.config.study import Study
from common.errors import LinkError, StudyError
from common.support import keys
from server.link.sites import Sites, SiteVersions
from server.project import certificates
from server.project.project import Project, RunState
from server.runs.run_folder import Checkpoint, RunFolder

HOSTS = ("study.example.org", "192.0.2.7")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.create(tmp_path / "coordinator", HOSTS, 8443)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_project_is_private(project: Project) -> None:
    assert mode(project.folder) == mode(project.runs) == 0o700
    assert {mode(path) for path in project.folder.iterdir() if path.is_file()} == {0o600}


def test_a_second_init_changes_nothing(project: Project) -> None:
    before = content(project.folder)
    with pytest.raises(LinkError, match=r"new or empty folder.*renew"):
        Project.create(project.folder, ("other.example.org",), 443)
    assert content(project.folder) == before


def test_what_is_created_is_what_is_opened(project: Project) -> None:
    settings = Project.open(project.folder).settings
    assert settings.hosts == HOSTS
    assert settings.port == 8443


@pytest.mark.parametrize("host", ["", "a b", "a..b", "-a", "*.example.org", "300.1.1.1", "a" * 64])
def test_a_host_that_no_certificate_can_name_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(LinkError, match="hosts"):
        Project.create(tmp_path / "coordinator", (host,), 443)
    assert not (tmp_path / "coordinator").exists()


def test_a_folder_without_a_project_and_one_open_to_others_are_refused(
    project: Project, tmp_path: Path
) -> None:
    with pytest.raises(LinkError, match="consilium-server init"):
        Project.open(tmp_path)
    project.folder.chmod(0o750)
    with pytest.raises(LinkError, match="chmod 700"):
        Project.open(project.folder)


def test_the_certificates_are_for_these_hosts_and_nothing_else(project: Project) -> None:
    authority = keys.read_certificate(project.folder / "ca.crt")
    server = keys.read_certificate(project.folder / "server.pem")
    extensions = server.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"study.example.org", "localhost"}
    addresses = {ipaddress.ip_address("192.0.2.7"), ipaddress.ip_address("127.0.0.1")}
    assert set(names.get_values_for_type(x509.IPAddress)) == addresses
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    server.verify_directly_issued_by(authority)
    assert (server.not_valid_after_utc - datetime.now(UTC)).days in (29, 30)
    years = (authority.not_valid_after_utc - datetime.now(UTC)).days / 365.25
    assert years == pytest.approx(10, abs=0.01)


def test_renewal_adds_names_keeps_the_authority_and_makes_a_new_key(project: Project) -> None:
    before = content(project.folder)
    old = keys.read_private(project.folder / "server.pem")
    renewed = project.renew(("new.example.org",))
    after = content(project.folder)
    changed = {Path(name).name for name in before if before[name] != after[name]}
    assert changed == {"server.pem", "coordinator.yaml"}
    assert keys.read_private(project.folder / "server.pem").public_key() != old.public_key()
    hosts = (*HOSTS, "new.example.org")
    assert renewed.settings.hosts == Project.open(project.folder).settings.hosts == hosts
    assert certificates.check_certificate(project.folder, hosts) == []


def test_renewal_needs_the_authority_s_key(project: Project) -> None:
    elsewhere, other = (project.folder.parent / f"{name}.key" for name in ("elsewhere", "other"))
    (project.folder / "ca.key").rename(elsewhere)
    with pytest.raises(LinkError, match=r"ca\.key.*--authority-key PATH"):
        project.renew(())
    keys.write_private(other, keys.new())
    with pytest.raises(LinkError, match="got another"):
        project.renew((), other)
    before = content(project.folder)
    project.renew((), elsewhere)
    assert set(content(project.folder)) == set(before), "the key stays where it is kept"
    assert certificates.check_certificate(project.folder, HOSTS) == []


def test_a_certificate_renews_itself_while_the_authority_s_key_is_there(project: Project) -> None:
    now, folder = datetime.now(UTC), project.folder
    assert not certificates.renew_in_time(folder, HOSTS)
    certificates.write_server(folder, HOSTS, now - timedelta(days=11))
    assert certificates.renew_in_time(folder, HOSTS)
    assert certificates.read_expiry(folder) - now > timedelta(days=29)
    certificates.write_server(folder, HOSTS, now - timedelta(days=16))
    (folder / "ca.key").rename(folder.parent / "elsewhere.key")
    assert not certificates.renew_in_time(folder, HOSTS)
    (warning,) = certificates.check_certificate(folder, HOSTS)
    assert "--authority-key PATH" in warning, "two weeks ahead"


def test_a_project_of_an_earlier_release_says_what_to_do(project: Project) -> None:
    (project.folder / "server.pem").rename(project.folder / "server.crt")
    with pytest.raises(LinkError, match=r"server\.pem: expected .*consilium-server renew"):
        certificates.check_certificate(project.folder, HOSTS)


def test_a_certificate_that_ends_soon_is_warned_of_and_one_that_ended_refused(
    project: Project,
) -> None:
    now = datetime.now(UTC)
    assert certificates.check_certificate(project.folder, HOSTS) == []
    certificates.write_server(project.folder, HOSTS, now - timedelta(days=16))
    (warning,) = certificates.check_certificate(project.folder, HOSTS)
    assert "consilium-server renew" in warning
    certificates.write_server(project.folder, HOSTS, now - timedelta(days=31))
    with pytest.raises(LinkError, match=r"expired on .* consilium-server renew"):
        certificates.check_certificate(project.folder, HOSTS)


def test_a_certificate_of_another_authority_key_or_name_is_noticed(
    project: Project, tmp_path: Path
) -> None:
    (warning,) = certificates.check_certificate(project.folder, (*HOSTS, "new.example.org"))
    assert "new.example.org" in warning
    other = Project.create(tmp_path / "other", HOSTS, 443)
    path = project.folder / "server.pem"
    certificate = path.read_bytes().partition(b"-----BEGIN CERT")[2]
    path.write_bytes(keys.private_pem(keys.new()) + b"-----BEGIN CERT" + certificate)
    with pytest.raises(LinkError, match="one for another key"):
        certificates.check_certificate(project.folder, HOSTS)
    (other.folder / "server.pem").replace(path)
    with pytest.raises(LinkError, match="one by another"):
        certificates.check_certificate(project.folder, HOSTS)


def test_a_key_has_one_name_and_a_name_one_key(project: Project) -> None:
    sites, east, west = Sites(project), keys.new().public_key(), keys.new().public_key()
    sites.admit(east, "east")
    for key, name, why in ((east, "west", "admitted as east"), (west, "East", "another site's")):
        with pytest.raises(LinkError, match=why):
            sites.admit(key, name)
    sites.admit(west, "west")
    found = Sites(project).list_sites()
    assert [(site.name, site.fingerprint) for site in found] == [
        ("east", keys.fingerprint(east)),
        ("west", keys.fingerprint(west)),
    ]
    assert not any(site.connected or site.seen or site.version for site in found)


def test_a_removed_key_and_its_name_are_free_again(project: Project) -> None:
    sites, first, second = Sites(project), keys.new().public_key(), keys.new().public_key()
    sites.admit(first, "east")
    sites.remove("east")
    assert sites.list_sites() == []
    sites.admit(second, "east")
    sites.admit(first, "west")
    assert [site.name for site in sites.list_sites()] == ["east", "west"]
    sites.remove("west")
    sites.admit(first, "west")
    assert [site.name for site in sites.list_sites()] == ["east", "west"]
    with pytest.raises(LinkError, match="Did you mean 'west'"):
        sites.remove("wets")


def test_a_release_is_remembered_by_key(tmp_path: Path) -> None:
    path = tmp_path / "releases.json"
    SiteVersions(path).note_version("ab", "0.1.0")
    SiteVersions(path).note_version("cd", "0.2.0")
    assert SiteVersions.read(path) == {"ab": "0.1.0", "cd": "0.2.0"}
    assert mode(path) == 0o600
    path.write_text("{")
    assert SiteVersions.read(path) == {}


def test_a_run_s_state_is_told(project: Project) -> None:
    content = {"name": "s", "classes": ["a", "b"], "model": {"backbone": "shufflenet_v2_x0_5"}}
    study = Study.parse(content | {"train": {"rounds": 7}}, "study", StudyError)
    first = RunFolder.create(project.runs / "first")
    first.write_study(study)
    assert project.list_runs() == [RunState("first", 0, 7, busy=False, finished=False)]
    first.save_last(Checkpoint(round=3, tensors={}, state={}))
    with first.locked():
        assert project.list_runs() == [RunState("first", 3, 7, busy=True, finished=False)]
    first.write("report.json", "{}")
    first.write("study.yaml", "{")
    assert project.list_runs() == [RunState("first", 3, None, busy=False, finished=True)]


def test_a_lock_is_seen_from_outside(project: Project) -> None:
    assert not project.is_up()
    with project.locked("start"):
        assert project.is_up()
        with (
            pytest.raises(LinkError, match="no other consilium-server start"),
            Project.open(project.folder).locked("start"),
        ):
            os.abort()
    assert not project.is_up()
