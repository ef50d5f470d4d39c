"""A backbone that is sent: whole or not at all, whatever breaks, and never more than it can be."""

import hashlib
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from client.weights import find_weights, receive_part
from common.config.study import Study
from common.errors import (
    BackboneError,
    ConsiliumError,
    ContractError,
    MissingWeightsError,
)
from common.model import backbones
from common.model.network import assemble
from common.protocol.backbone import BackboneHeld, BackbonePart
from server.rounds import weights as sending
from server.rounds.weights import Backbone
from tests.builders import make_site, make_study

NAME = "shufflenet_v2_x0_5"


@pytest.fixture
def study(tmp_path):
    model = backbones.get(NAME).build(classes=2, dropout=0.0, weights="none", seed=1)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("fc.")}
    (tmp_path / "coordinator").mkdir()
    path = tmp_path / "coordinator" / "weights.pth"
    torch.save(state, path)
    return make_study(classes=["a", "b"], model={"backbone": NAME, "weights": str(path)})


@pytest.fixture
def site(tmp_path):
    return make_site(tmp_path / "ward")


def told(study):
    """As a site sees the study."""
    return Study.model_validate_json(study.proposal())


def send(source, site, study, held=0):
    """All that is left, as the server would."""
    while held < source.size:
        held = receive_part(site, study, source.cut_part(BackboneHeld(held)))
    return held


def test_what_was_sent_makes_the_same_network(study, site, monkeypatch):
    monkeypatch.setattr(sending, "_PIECE", 100_000)
    source, here = Backbone(study), told(study)
    with pytest.raises(MissingWeightsError, match=r"expected a folder with weights\.pth"):
        find_weights(site, here)
    assert receive_part(site, here, source.announce()) == 0
    send(source, site, here)
    theirs = assemble(study, study.model.weights).contract
    assert theirs.differences(assemble(here, find_weights(site, here)).contract) == []
    assert not list(site.state.rglob("*.part"))


def test_a_transfer_goes_on_where_it_broke_off_and_serves_other_studies(study, site, monkeypatch):
    monkeypatch.setattr(sending, "_PIECE", 100_000)
    source, here = Backbone(study), told(study)
    receive_part(site, here, source.cut_part(BackboneHeld(0)))
    assert (
        receive_part(site, here, source.cut_part(BackboneHeld(300_000))) == 100_000
    )  # a piece is missing
    assert receive_part(site, here, source.cut_part(BackboneHeld(0))) == 100_000  # twice the same
    again = Backbone(study)  # a coordinator that was killed
    send(again, site, here, receive_part(site, here, again.announce()))
    find_weights(site, here)
    other = told(study.model_copy(update={"seed": 5}))
    assert other.id != here.id
    announced = Backbone(study.model_copy(update={"seed": 5})).announce()
    assert receive_part(site, other, announced) == source.size
    find_weights(site, other)


def test_what_is_not_what_was_announced_is_deleted(study, site):
    source, here = Backbone(study), told(study)
    part = source.cut_part(BackboneHeld(0))
    wrong = b"\0" * len(part.data)
    with pytest.raises(ContractError, match="SHA-256"):
        receive_part(site, here, BackbonePart(**{**vars(part), "data": wrong}))
    with pytest.raises(MissingWeightsError):
        find_weights(site, here)
    assert receive_part(site, here, source.announce()) == 0


def test_more_than_the_backbone_can_be_is_refused(study, site):
    here = told(study)
    most = backbones.get(NAME).largest_file
    part = BackbonePart(study=here.id, sha256="a" * 64, size=most + 1, offset=0, data=b"x")
    with pytest.raises(ContractError, match="are plenty"):
        receive_part(site, here, part)
    assert not (site.state / "weights").exists()


@pytest.mark.parametrize("name", ["..", "/", ".", "part", "../../../secret"])
def test_a_name_from_the_network_stays_in_its_folder(study, site, name):
    model = study.model.model_copy(update={"weights": name})
    here = study.model_copy(update={"model": model})
    data = b"no backbone"
    sha = hashlib.sha256(data).hexdigest()
    part = BackbonePart(study=here.id, sha256=sha, size=len(data), offset=0, data=data)
    with suppress(ConsiliumError):
        receive_part(site, here, part)
    outside = [p for p in site.state.parent.rglob("*") if p.is_file() and p.read_bytes() == data]
    assert all((site.state / "weights") in path.parents for path in outside)


def test_a_site_that_has_the_file_uses_its_own(study, site, tmp_path):
    here = told(study)
    send(Backbone(study), site, here)
    own = tmp_path / "own"
    own.mkdir()
    save_file({"a": torch.zeros(1)}, own / "weights.pth")
    mine = site.model_copy(update={"weights": own})
    assert find_weights(mine, here) == str(own / "weights.pth")
    with pytest.raises(BackboneError):
        assemble(here, find_weights(mine, here))
