"""What bfloat16 would gain is measured for people to read, and leaves everything as it was."""

import pytest
import torch

from client.admin.speed import Gain, measure_gain
from common.config.study import Study
from common.model.network import assemble

pytestmark = pytest.mark.numbers


def network(unfreeze="last:1"):
    return assemble(
        Study(
            name="t",
            classes=("a", "b", "c"),
            model={"backbone": "shufflenet_v2_x0_5", "weights": "none", "unfreeze": unfreeze},
            images={"size": 64},
            train={"rounds": 1},
        ),
        "none",
    )


def test_measuring_leaves_the_network_alone():
    net = network()
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    found = measure_gain(net, private=False)
    assert found.frozen > 0
    assert found.trained > 0
    assert all(torch.equal(net.model.state_dict()[name], t) for name, t in before.items())
    assert all(p.grad is None for p in net.model.parameters())


def test_only_what_the_study_would_compute_in_it_is_measured():
    assert measure_gain(network(), private=True).trained is None
    assert measure_gain(network("all"), private=False).frozen is None


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (Gain(2.0, 1.5), True),
        (Gain(2.0, 1.0), True),
        (Gain(2.0, None), True),
        (Gain(None, 2.0), True),
        (Gain(1.2, 1.2), False),
        (Gain(2.0, 0.5), False),
        (Gain(0.5, 0.5), False),
        (Gain(None, None), False),
    ],
)
def test_it_is_recommended_where_it_is_clearly_faster(found, wanted):
    assert found.recommended == wanted
    assert str(found).endswith(": ask for bfloat16" if wanted else ": stay with float32")
