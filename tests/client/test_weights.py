"""A backbone that is sent: whole or not at all, whatever breaks, and never more than it can be."""

import hashlib
import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file

from client.weights import find_weights, receive_part
from common.config.study import Study
from common.errors import BackboneError, ContractError, MissingWeightsError
from common.model import backbones
from common.model.network import assemble
from common.protocol.backbone import BackboneHeld, BackbonePart
from server.rounds import weights as sending
from server.rounds.weights import BackboneFile
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
    monkeypatch.setattr(sending, "PIECE", 100_000)
    source, here = BackboneFile(study), told(study)
    with pytest.raises(MissingWeightsError, match=r"expected a folder with weights\.pth"):
        find_weights(site, here)
    assert receive_part(site, here, source.announce()) == 0
    send(source, site, here)
    theirs = assemble(study, study.model.weights).contract
    assert theirs.differences(assemble(here, find_weights(site, here)).contract) == []
    assert not list(site.state.rglob("*.part"))


def test_a_transfer_goes_on_where_it_broke_off_and_serves_other_studies(study, site, monkeypatch):
    monkeypatch.setattr(sending, "PIECE", 100_000)
    source, here = BackboneFile(study), told(study)
    receive_part(site, here, source.cut_part(BackboneHeld(0)))
    assert (
        receive_part(site, here, source.cut_part(BackboneHeld(300_000))) == 100_000
    )  # a piece is missing
    assert receive_part(site, here, source.cut_part(BackboneHeld(0))) == 100_000  # twice the same
    again = BackboneFile(study)  # a coordinator that was killed
    send(again, site, here, receive_part(site, here, again.announce()))
    find_weights(site, here)
    other = told(study.model_copy(update={"seed": 5}))
    assert other.id != here.id
    announced = BackboneFile(study.model_copy(update={"seed": 5})).announce()
    assert receive_part(site, other, announced) == source.size
    find_weights(site, other)


def test_what_is_not_what_was_announced_is_deleted(study, site):
    source, here = BackboneFile(study), told(study)
    part = source.cut_part(BackboneHeld(0))
    wrong = b"\0" * len(part.data)
    with pytest.raises(ContractError, match="SHA-256"):
        receive_part(site, here, BackbonePart(**{**vars(part), "data": wrong}))
    with pytest.raises(MissingWeightsError):
        find_weights(site, here)
    assert receive_part(site, here, source.announce()) == 0


def deliver(data, site, study):
    """Any bytes as the backbone of a study, announced as they are."""
    sha = hashlib.sha256(data).hexdigest()
    part = BackbonePart(study=study.id, sha256=sha, size=len(data), offset=0, data=data)
    return receive_part(site, study, part)


def test_more_than_the_backbone_can_be_is_refused(study, site):
    most = backbones.get(NAME).largest_sent
    with pytest.raises(ContractError, match="are plenty"):
        deliver(b"\0" * (most + 1), site, told(study))
    assert not (site.state / "weights").exists()


@pytest.mark.parametrize("name", ["..", "/", ".", "part", "../../../secret"])
def test_no_name_from_the_network_is_a_file_here(study, site, name):
    model = study.model.model_copy(update={"weights": name})
    data = BackboneFile(study)._data
    here = study.model_copy(update={"model": model})
    deliver(data, site, here)
    found = [p for p in site.state.parent.rglob("*") if p.is_file() and p.read_bytes() == data]
    assert found == [site.state / "weights" / f"{hashlib.sha256(data).hexdigest()}.safetensors"]


def pickled(size):
    """A checkpoint of zeros as `torch.save` writes it, and packed."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(size)}, plain)
    with (
        zipfile.ZipFile(plain) as given,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for part in given.namelist():
            made.writestr(part, given.read(part))
    return plain.getvalue(), packed.getvalue()


@pytest.mark.parametrize("kind", [0, 1])
def test_a_pickle_that_is_sent_is_never_kept_whatever_it_is_called(study, site, kind):
    data = pickled(2_000_000 if kind else 100)[kind]
    assert len(data) < 50_000
    assert told(study).model.weights.endswith(".pth")
    with pytest.raises(ContractError, match="file of safetensors"):
        deliver(data, site, told(study))
    assert not list((site.state / "weights").iterdir())
    with pytest.raises(MissingWeightsError):
        find_weights(site, told(study))


def test_a_kept_backbone_is_read_as_safetensors_alone(study, site):
    send(BackboneFile(study), site, told(study))
    path = site.state / "weights" / f"{BackboneFile(study)._sha256}.safetensors"
    assert find_weights(site, told(study)) == str(path)
    path.write_bytes(pickled(100)[0])
    with pytest.raises(BackboneError, match="damaged"):
        assemble(told(study), str(path))


def test_an_own_file_that_unpacks_to_more_than_it_takes_is_refused(study, site, tmp_path):
    (tmp_path / "own").mkdir()
    own = tmp_path / "own" / "weights.pth"
    own.write_bytes(pickled(2_000_000)[1])
    mine = site.model_copy(update={"weights": own.parent})
    with pytest.raises(BackboneError, match=r"weights\.pth: expected as many bytes as it holds"):
        assemble(told(study), find_weights(mine, told(study)))


def changed(data, change):
    """A file of safetensors with its header changed."""
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    numbers = change(header, numbers) or numbers
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def test_a_header_may_be_written_otherwise(study, site):
    """Each refusal below is for its own change."""
    data = changed(BackboneFile(study)._data, lambda header, numbers: None)
    assert data != BackboneFile(study)._data
    assert deliver(data, site, told(study)) == len(data)


def other_shape(header, numbers):
    header["conv1.0.weight"]["shape"].reverse()


def beyond_its_end(header, numbers):
    header["conv1.0.weight"]["shape"][0] *= 2**40


def twice_the_same(header, numbers):
    header["conv1.1.weight"]["data_offsets"] = header["conv1.1.bias"]["data_offsets"]


def one_more(header, numbers):
    header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(numbers)] * 2}


def one_more_in_the_head(header, numbers):
    header["fc.extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(numbers)] * 2}


def one_less(header, numbers):
    del header["conv1.0.weight"]


def a_hidden_tail(header, numbers):
    return numbers + b"tail"


def cut_short(header, numbers):
    return numbers[:-4]


def integers(header, numbers):
    header["conv1.1.weight"]["dtype"] = "I32"


def halves(header, numbers):
    header["conv1.1.weight"] |= {"dtype": "F16", "shape": [48]}


def a_long_header(header, numbers):
    header["__metadata__"] = {"a": "b" * 2**20}


@pytest.mark.parametrize(
    "change",
    [
        other_shape,
        beyond_its_end,
        twice_the_same,
        one_more,
        one_more_in_the_head,
        one_less,
        a_hidden_tail,
        cut_short,
        integers,
        halves,
        a_long_header,
    ],
)
def test_a_header_that_is_not_the_backbones_is_refused_before_a_tensor_is_made(study, site, change):
    data = changed(BackboneFile(study)._data, change)
    with pytest.raises(ContractError, match=r"no backbone|are plenty"):
        deliver(data, site, told(study))
    assert not list((site.state / "weights").glob("*"))


def test_a_study_keeps_one_backbone_however_many_are_sent(study, site):
    here = told(study)
    for number in range(3):
        state = backbones.get(NAME).read_weights(study.model.weights)
        state["conv1.1.bias"] += number
        deliver(save(state), site, here)
        assert len(list((site.state / "weights").iterdir())) == 1


def test_a_site_that_has_the_file_uses_its_own(study, site, tmp_path):
    here = told(study)
    send(BackboneFile(study), site, here)
    own = tmp_path / "own"
    own.mkdir()
    save_file({"a": torch.zeros(1)}, own / "weights.pth")
    mine = site.model_copy(update={"weights": own})
    assert find_weights(mine, here) == str(own / "weights.pth")
    with pytest.raises(BackboneError):
        assemble(here, find_weights(mine, here))
