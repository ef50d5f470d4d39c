"""Everything at a hospital that could fail later, looked at now. Nothing here shows a patient."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from client import weights
from client.admin.cost import estimate_cost, estimate_room
from client.admin.speed import Gain, measure_gain
from client.data.records import Record, Row
from client.features.precision import can_compute, choose_device
from client.ledger import ledger
from client.link import tls
from client.link.fleet_client import Fleet, Heard
from client.site import Connect, Site
from client.storage import explain_disk_errors
from common.config.study import Study
from common.errors import (
    ConsiliumError,
    DataError,
    LinkError,
    MissingWeightsError,
    RefusedError,
    SiteError,
)
from common.flower.compat import VERSION, is_same_version
from common.model import backbones
from common.model.contract import Versions
from common.model.images import Preprocess
from common.model.network import assemble
from common.support import files, keys
from common.support.signing import AHEAD, BEHIND
from common.support.terminal import size

T = TypeVar("T")

_SAMPLE = 16
_SMALL = Preprocess(resize=32, crop=32, mean=(0, 0, 0), std=(1, 1, 1))
_SOON = timedelta(days=10)
_CLOSE = 3.0


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    good: bool
    text: str
    """How it is or, if that is not good, what to do."""


def examine_site(
    site_file: Path, study_file: Path | None = None, *, speed: bool = False
) -> Iterator[Finding]:
    """Look at one thing after the other; what fails does not keep the rest from being looked at.

    Args:
      site_file: Of the site.
      study_file: A study to look at as well.
      speed: Whether to measure, on its network, what bfloat16 would gain here.
    """
    yield Finding("release", True, _releases())
    site, finding = _try("site file", lambda: Site.read(site_file), lambda s: f"{s.name}: {s.role}")
    yield finding
    if site is None:
        return
    yield _try("state", lambda: _state(site))[1]
    yield _try("ledger", lambda: _ledger(site))[1]
    study = None
    if study_file is not None:
        study, finding = _try("study", lambda: Study.read(study_file), lambda s: s.name)
        yield finding
    yield from _images(site, study)
    if study is not None:
        yield _try("policy", lambda: _agreed(site, study))[1]
        yield _try("backbone", lambda: _backbone(site, study))[1]
        if speed:
            yield _try("speed", lambda: _speed(site, study))[1]
    yield from _connection(site)


def _try(
    what: str, look: Callable[[], T], tell: Callable[[Any], str] = str
) -> tuple[T | None, Finding]:
    """What was found, and what to say of it."""
    try:
        found = look()
        return found, Finding(what, True, tell(found))
    except ConsiliumError as ex:
        return None, Finding(what, False, str(ex))


def _releases() -> str:
    here = Versions.here()
    return f"Consilium {VERSION}, python {here.python}, flwr {here.flwr}, torch {here.torch}"


# --- on this machine ---


def _state(site: Site) -> str:
    folder = site.private()
    probe = folder / "check"
    with explain_disk_errors(f"{site.source}: state", SiteError):
        files.write(probe, b"", mode=0o600)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    return f"{folder} can be written, {size(free)} free"


def _ledger(site: Site) -> str:
    lines = len(ledger.read_ledger(site.state))
    if lines:
        ledger.check_place(site.state)
    return f"{lines} lines, as they were written" if lines else "none yet"


def _images(site: Site, study: Study | None) -> Iterator[Finding]:
    def look() -> Sequence[Record | Row]:
        return site.data.records(study.classes) if study else site.data.rows(())

    images, finding = _try("data", look, _counted)
    yield finding
    if not images:
        return
    skips = study is not None and study.images.unreadable == "skip"
    yield _try("images", lambda: _readable(images, skips))[1]
    yield _try("disk", lambda: _room(site, study, len(images)))[1]


def _counted(found: Sequence[Record | Row]) -> str:
    patients = len({one.patient for one in found})
    labels = len({one.label for one in found})
    return f"{len(found):,} images of {patients:,} patients, {labels} labels, every file is there"


def _readable(found: Sequence[Record | Row], skips: bool) -> str:
    """Tells images by their place in the data: a path may name a patient."""
    chosen = range(0, len(found), max(len(found) // _SAMPLE, 1))[:_SAMPLE]
    bad = []
    for i in chosen:
        try:
            found[i].image.square(_SMALL)
        except DataError:
            bad.append(i + 1)
    if bad and not skips:
        got = f"{len(bad)} of {len(chosen)} that cannot, in the data's order {bad}"
        remedy = "Mend or remove them; a study may also say images: {unreadable: skip}."
        raise DataError("images", expected="all to be readable", got=got, remedy=remedy)
    return f"{len(chosen) - len(bad)} of a sample of {len(chosen)} can be read"


def _room(site: Site, study: Study | None, images: int) -> str:
    needed, limit = estimate_room(study, images), site.cache.limit
    folder = site.cache_folder
    with explain_disk_errors(folder, SiteError):
        free = shutil.disk_usage(folder).free
    if free < min(needed, limit or needed):
        expected, got = f"about {size(needed)} for prepared images", f"{size(free)} free"
        remedy = "Free some space, or set cache.folder or cache.limit_gb."
        raise SiteError(folder, expected=expected, got=got, remedy=remedy)
    return f"prepared images take about {size(needed)}, {size(free)} free"


def _agreed(site: Site, study: Study) -> str:
    found = estimate_cost(site, study)
    no = found.refusal or (found.noise.unaffordable if found.noise else None)
    if no:
        raise RefusedError(no)
    return f"agrees; {found.training:,} patients would train"


def _backbone(site: Site, study: Study) -> str:
    name = backbones.get(study.model.backbone).name
    try:
        return f"{name}, weights: {weights.find_weights(site, study)}"
    except MissingWeightsError:
        return f"{name}, no weights here: the coordinator sends them at join"


def _speed(site: Site, study: Study) -> Gain:
    device = choose_device(site.device)
    if not can_compute("bfloat16", device):
        where, expected = f"{site.source}: device", "one that computes in bfloat16"
        raise SiteError(where, expected=expected, got=device.type)
    network = assemble(study, "none")  # random ones take as long
    network.model.to(device)
    return measure_gain(network, private=study.private)


# --- towards the coordinator ---


def _connection(site: Site) -> Iterator[Finding]:
    connections, finding = _try("server", site.list_connections)
    if connections is None:
        yield finding
    for connect in connections or ():
        yield from _coordinator(site, connect)


def _coordinator(site: Site, connect: Connect) -> Iterator[Finding]:
    yield _try("key", lambda: _key(connect))[1]
    yield _try("ca", lambda: _authority(connect))[1]
    fleet, finding = _try("server", lambda: Fleet.open(site, connect))
    if fleet is None:
        yield finding
        return
    trouble = None
    try:
        fleet.check_admitted()
    except LinkError as ex:
        trouble = ex
    finally:
        fleet.close()
    if fleet.heard is None:
        yield Finding("server", False, str(trouble))
        return
    yield Finding("server", True, f"{fleet.server} answers")
    yield from _server(fleet.heard, trouble)


def _key(connect: Connect) -> str:
    key = keys.read_private(connect.key).public_key()
    return f"{connect.key}, fingerprint {keys.fingerprint(key)}"


def _authority(connect: Connect) -> str:
    return f"{connect.ca}, fingerprint {keys.fingerprint(tls.read_authority(connect.ca))}"


def _server(heard: Heard, trouble: LinkError | None) -> Iterator[Finding]:
    soon = heard.until - datetime.now(UTC) < _SOON
    until = f"vouched for, until {heard.until:%Y-%m-%d}" + ("; remind the coordinator" * soon)
    yield Finding("certificate", True, until)
    ahead, theirs = heard.ahead or 0.0, heard.version
    on_time = trouble is None or -BEHIND < ahead < AHEAD
    apart = f"{ahead:+.0f} s here" if abs(ahead) >= _CLOSE else "both agree"
    yield Finding("clocks", on_time, apart if on_time else str(trouble))
    same = theirs is None or is_same_version(theirs)
    text = f"Consilium {theirs or 'of an untold release'}"
    text += "" if same else f", and {VERSION} here: install the same on both sides"
    yield Finding("its release", same, text)
    if on_time:
        yield Finding("admitted", trouble is None, str(trouble or "the coordinator knows the key"))
