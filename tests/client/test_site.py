"""A hospital's own file: its paths, its private folder, its last word."""

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from client.data.manifest import Manifest
from client.ledger.outbox import Outbox
from client.site import Site
from common.errors import SiteError
from common.support import files
from tests.builders import make_site, write_site


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(path: Path) -> str:
    with pytest.raises(SiteError) as caught:
        Site.read(path)
    return str(caught.value)


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hospital"
    folder.mkdir()
    data = {"format": "manifest", "root": "../images", "patients": "some.txt"}
    write_site(folder, data=data, cache={"folder": "../kept"}, weights="nets")
    monkeypatch.chdir(tmp_path)
    for path in (folder / "site.yaml", Path("hospital/site.yaml")):
        read = Site.read(path)
        assert isinstance(read.data, Manifest)
        assert read.data.root.resolve() == tmp_path / "images"
        assert read.data.patients == folder / "some.txt"
        assert (read.state, read.weights) == (folder / "state", folder / "nets")
        assert read.cache_folder.resolve() == tmp_path / "kept"
        assert read.source == str(path)


def test_the_cache_is_private_unless_the_hospital_says_where(tmp_path: Path) -> None:
    assert make_site(tmp_path).cache_folder == tmp_path / "state" / "cache"
    limited = make_site(tmp_path, cache={"limit_gb": 1.5, "days": 30})
    assert limited.cache_folder == tmp_path / "state" / "cache"
    elsewhere = tmp_path / "elsewhere" / "prepared"
    assert make_site(tmp_path, cache={"folder": str(elsewhere)}).cache_folder == elsewhere
    assert mode(elsewhere) == 0o700


def test_the_cache_has_no_limits_unless_the_hospital_sets_them(tmp_path: Path) -> None:
    cache = make_site(tmp_path).cache
    assert (cache.limit, cache.days) == (None, None)
    for given, wanted in ((50, 50 * 10**9), (0.25, 250 * 10**6)):
        assert make_site(tmp_path, cache={"limit_gb": given}).cache.limit == wanted


def test_a_cache_by_its_path_alone_is_shown_the_section(tmp_path: Path) -> None:
    path = write_site(tmp_path, cache="/scratch/prepared")
    told = refusal(path)
    assert told.startswith(f"{path}: cache: expected a mapping of keys to values, got '/scratch")
    assert "Write cache: {folder: /scratch/prepared}." in told
    remedy = told[told.index("Write ") + len("Write ") : -1]
    path.write_text(path.read_text().replace("cache: /scratch/prepared", remedy))
    assert Site.read(path).cache.folder == Path("/scratch/prepared")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"polcy": {}}, ["polcy", "Did you mean 'policy'?"]),
        ({"precision": "auto"}, ["no key precision, got 'auto'. Remove it", "model.precision"]),
        ({"threads": 0}, ["threads", "greater than or equal to 1", "got 0"]),
        ({"policy": {"min_patient": 2}}, ["policy.min_patient", "Did you mean 'min_patients'?"]),
        ({"data": {"format": "manifest", "rot": "x"}}, ["data.rot", "Did you mean 'root'?"]),
        (
            {"data": {"format": "manifset", "root": "x"}},
            ["data.format", "Did you mean 'manifest'?"],
        ),
        ({"data": {"root": "x"}}, ["data.format", "expected a value, got nothing"]),
        ({"data": "images"}, ["data"]),
        ({"policy": {"min_patients": 0}}, ["policy.min_patients", "greater than or equal to 1"]),
        ({"policy": {"require_privacy": "perhaps"}}, ["policy.require_privacy", "'perhaps'"]),
        ({"policy": {"unfreeze": ["heads"]}}, ["policy.unfreeze.0", "head, last:<k> or all"]),
        ({"policy": {"unfreeze": "head"}}, ["policy.unfreeze", "a list", "'head'"]),
        ({"policy": {"max_epsilon": 0}}, ["policy.max_epsilon", "greater than 0", "got 0"]),
        ({"policy": {"max_epsilon": float("inf")}}, ["policy.max_epsilon", "a finite number"]),
        ({"policy": {"max_epsilon": True}}, ["policy.max_epsilon", "a number, got True"]),
        (
            {"policy": {"max_epsilon": 1e9, "delta": 1e-5}},
            ["max_epsilon: expected", "got 1e+09. So"],
        ),
        (
            {"policy": {"delta": 0.01}},
            ["policy.delta", "at most 0.001", "got 0.01", "write 1.0e-5"],
        ),
        ({"policy": {"disclose": {"epsilon": 101}}}, ["disclose.epsilon", "at most 100, got 101"]),
        (
            {
                "data": {"format": "manifest", "root": "x", "enrolled_patients": 600},
                "policy": {"delta": 2e-4},
            },
            [
                "policy.delta of at most 0.000166667, a tenth",
                "(600), got 0.0002. Write delta: 0.0001",
            ],
        ),
        ({"policy": {"delta": 0}}, ["policy.delta", "greater than 0", "got 0"]),
        (
            {"policy": {"backbones": "resnet18"}},
            ["policy.backbones", "a list of names", "'resnet18'"],
        ),
        ({"policy": {"backbones": {"resnet18": "57e9"}}}, ["policy.backbones.resnet18", "57e9"]),
        ({"policy": {"max_local_epochs": 0}}, ["policy.max_local_epochs", "equal to 1", "got 0"]),
        ({"policy": {"max_local_steps": 1.5}}, ["policy.max_local_steps", "integer", "got 1.5"]),
        ({"policy": {"max_batch_size": True}}, ["policy.max_batch_size", "integer", "got True"]),
        ({"policy": {"disclose": "none"}}, ["policy.disclose", "a mapping of keys to values"]),
        ({"policy": {"disclose": {"count": "none"}}}, ["disclose.count", "Did you mean 'counts'?"]),
        (
            {"policy": {"disclose": {"counts": "round"}}},
            ["policy.disclose.counts", "'exact', 'rounded' or 'none'", "Did you mean 'rounded'?"],
        ),
        (
            {"policy": {"disclose": {"metrics": "last"}}},
            ["policy.disclose.metrics", "'every_round', 'final' or 'none'", "'last'"],
        ),
        ({"policy": {"disclose": {"min_cell": 0}}}, ["disclose.min_cell", "equal to 1", "got 0"]),
        ({"policy": {"disclose": {"min_cell": True}}}, ["disclose.min_cell", "integer"]),
        ({"state": 5}, ["state", "a path"]),
        ({"name": "a/b"}, ["name", "'a/b'"]),
        ({"cache": {"limit": 5}}, ["cache.limit", "Did you mean 'limit_gb'?"]),
        ({"cache": {"limit_gb": 0}}, ["cache.limit_gb", "greater than 0", "got 0"]),
        ({"cache": {"limit_gb": True}}, ["cache.limit_gb", "a valid number", "got True"]),
        ({"cache": {"limit_gb": float("inf")}}, ["cache.limit_gb", "a finite number"]),
        ({"cache": {"days": 0}}, ["cache.days", "greater than or equal to 1"]),
        ({"cache": {"days": 1.5}}, ["cache.days", "got 1.5"]),
        ({"cache": 5}, ["cache", "a mapping of keys to values", "got 5"]),
        ({"role": "boss"}, ["role", "'train' or 'evaluate'", "'boss'"]),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    path = write_site(tmp_path, **changes)
    told = refusal(path)
    assert told.startswith(f"{path}: ")
    assert [word for word in words if word not in told] == []


def test_a_policy_given_twice_is_refused(tmp_path: Path) -> None:
    path = write_site(tmp_path)
    path.write_text(
        path.read_text() + "policy: {require_privacy: true}\npolicy: {min_patients: 5}\n"
    )
    assert "the key 'policy' twice" in refusal(path)
    assert "No such file" in refusal(tmp_path / "none.yaml")


@pytest.fixture
def open_umask() -> Any:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("parts", [(), ("studies",), ("studies", "deep")])
def test_the_state_folder_is_private(parts: tuple[str, ...], tmp_path: Path) -> None:
    folder = make_site(tmp_path, state="var/state").private(*parts)
    assert folder == tmp_path.joinpath("var/state", *parts)
    while folder != tmp_path / "var":
        assert mode(folder) == 0o700, folder
        folder = folder.parent


@pytest.mark.usefixtures("open_umask")
def test_the_secret_is_private_and_stays(tmp_path: Path) -> None:
    secret = make_site(tmp_path).secret()
    assert mode(tmp_path / "state") == 0o700
    assert mode(tmp_path / "state" / "secret") == 0o600
    assert len(secret) == 32
    assert (tmp_path / "state" / "secret").read_bytes() == secret
    assert make_site(tmp_path).secret() == secret
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["secret"]


def test_every_hospital_draws_its_own_secret(tmp_path: Path) -> None:
    secrets = {make_site(tmp_path, state=f"state{i}").secret() for i in range(8)}
    assert len(secrets) == 8


def test_creators_at_once_agree_on_the_secret(tmp_path: Path) -> None:
    here = make_site(tmp_path)
    for attempt in range(20):
        hospital = here.model_copy(update={"state": tmp_path / f"state{attempt}"})
        ready, seen = threading.Barrier(4), []

        def draw(hospital: Site = hospital, ready: Any = ready, seen: Any = seen) -> None:
            ready.wait()
            seen.append(hospital.secret())

        threads = [threading.Thread(target=draw) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 4
        assert set(seen) == {hospital.secret()}


def test_of_two_files_created_at_once_the_first_stays(tmp_path: Path) -> None:
    # The order that a race leaves to chance: both found nothing there, both write.
    path = tmp_path / "secret"
    files.create(path, b"first", mode=0o600)
    files.create(path, b"second", mode=0o600)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(SiteError, match=r"site\.yaml: state: expected a place to read and write"):
        make_site(tmp_path).private()
    with pytest.raises(SiteError, match="expected a place to read and write"):
        make_site(tmp_path, state="state/inside").secret()


@pytest.mark.parametrize("rights", [0o755, 0o750, 0o701, 0o720])
def test_a_state_folder_open_to_others_is_refused(rights: int, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(rights)
    for use in (Site.private, Site.secret, lambda hospital: hospital.cache_folder):
        with pytest.raises(SiteError, match=rf"got mode {rights:o}\. chmod 700 .*/state$"):
            use(make_site(tmp_path))
    assert list((tmp_path / "state").iterdir()) == []
    (tmp_path / "state").chmod(0o700)
    make_site(tmp_path).private()


@pytest.mark.parametrize("rights", [0o777, 0o755, 0o750, 0o701, 0o720])
def test_a_cache_folder_open_to_others_is_refused(rights: int, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(rights)
    where = r"site\.yaml: cache\.folder: expected a folder closed to other users"
    with pytest.raises(SiteError, match=rf"{where}, got mode {rights:o}\. chmod 700 {folder}$"):
        _ = make_site(tmp_path, cache={"folder": str(folder)}).cache_folder
    folder.chmod(0o700)
    assert make_site(tmp_path, cache={"folder": str(folder)}).cache_folder == folder


@pytest.mark.parametrize("part", ["cache", "outbox", "studies", "weights", "logs", "link"])
def test_a_link_out_of_state_into_an_open_folder_is_refused(part: str, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    state = make_site(tmp_path).private()
    (state / part).symlink_to(tmp_path / "open")
    with pytest.raises(SiteError, match=rf"got mode 777\. chmod 700 {state / part}$"):
        Outbox(state / part) if part == "outbox" else make_site(tmp_path).private(part)


@pytest.mark.usefixtures("open_umask")
def test_the_cache_inside_state_is_private(tmp_path: Path) -> None:
    assert mode(make_site(tmp_path).cache_folder) == 0o700


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_length_is_refused(size: int, tmp_path: Path) -> None:
    files.write(make_site(tmp_path).private() / "secret", b"x" * size)
    with pytest.raises(SiteError, match=rf"secret: expected 32 bytes, got {size} bytes\. Restore"):
        make_site(tmp_path).secret()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match=r"site\.yaml: cache\.folder: expected a place to .*file"):
        _ = make_site(tmp_path, cache={"folder": "file/cache"}).cache_folder


def test_home_is_understood_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    data = {"format": "manifest", "root": "~/images", "patients": "~nobody-at-all/p.txt"}
    read = make_site(tmp_path, data=data, state="~/state")
    assert read.data.root == Path("/home/ada/images")
    assert read.state == Path("/home/ada/state")
    assert read.data.patients == tmp_path / "~nobody-at-all/p.txt"


def test_truth_is_no_number_of_patients(tmp_path: Path) -> None:
    told = refusal(write_site(tmp_path, policy={"min_patients": True}))
    assert "policy.min_patients: expected a valid integer, got True" in told


def test_several_coordinators_are_a_list_and_each_has_a_folder(tmp_path: Path) -> None:
    one = {"server": "a.example:443", "ca": "a.crt", "key": "site.key"}
    two = {"server": "b.example:443", "ca": "b.crt", "key": "site.key"}
    assert len(make_site(tmp_path, connect=one).connect) == 1
    site = make_site(tmp_path, connect=[one, two])
    assert [each.ca for each in site.connect] == [tmp_path / "a.crt", tmp_path / "b.crt"]
    folders = {site.find_link_folder(each) for each in site.connect}
    assert {folder.name for folder in folders} == {"a.example-443", "b.example-443"}
    with pytest.raises(SiteError, match=r"connect: .*expected each server once"):
        make_site(tmp_path, connect=[one, two, one])
    with pytest.raises(SiteError, match="connect: expected server, ca and key, got nothing"):
        make_site(tmp_path, connect=[]).list_connections()
