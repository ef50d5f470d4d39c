"""Attacks on the sums behind a private head: a patient counts for one bounded row, whoever asks."""

import numpy as np
import pytest
import torch
from torch import nn

from client.features.extract import Prepared
from client.features.store import Rows
from client.privacy.noise import Entropy
from client.privacy.noised_rows import choose_rows, make_rows, noise_rows
from client.privacy.noised_sum import NoisedSum
from client.privacy.parameters import PrivateRelease
from client.privacy.sampling import Patients
from client.training.dataset import Examples
from common.heads.whitening import MOMENTS_NORM, PROTOTYPES_NORM
from common.model.backbones import Head

pytestmark = pytest.mark.numbers

WIDTH, R, K = 40, 6, 3
NORM = {"moments": MOMENTS_NORM, "prototypes": PROTOTYPES_NORM}
KINDS = tuple(NORM)
INPUTS = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % K


def suffix(scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = Head(WIDTH, K, 0.5, unit=True, directions=R)
    head.whiten.basis.copy_(scale * torch.randn(R, WIDTH, generator=generator))
    head.whiten.centre.copy_(0.1 * torch.randn(R, generator=generator))
    head.whiten.matrix.copy_(scale * torch.randn(R, R, generator=generator))
    return head


def examples(inputs=INPUTS, labels=LABELS):
    rows = Rows([(inputs, i) for i in range(len(inputs))])
    return Examples(Prepared(rows, 1, nn.Identity()), labels)


def rows_of(kind, head, data, ids):
    make_row, _ = choose_rows(kind, K, R)
    return list(make_rows(head, data, Patients.of(ids), make_row))


def release(kind, sigma=1.0):
    return PrivateRelease(
        mechanism="gaussian",
        noise_multiplier=sigma,
        sample_rate=1.0,
        steps=1,
        delta=1e-5,
        clip_norm=NORM[kind],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-30, 0.0])
def test_no_whitening_makes_a_patient_count_for_more(kind, scale):
    hostile = (INPUTS * 1e30, INPUTS * 0, INPUTS * float("nan"), INPUTS)
    for inputs in hostile:
        for row in rows_of(kind, suffix(scale), examples(inputs), list(map(str, range(12)))):
            length = row.double().nan_to_num().norm()
            assert length <= NORM[kind] * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_patient_adds_is_the_same_to_the_last_bit_whoever_is_beside(kind):
    head, ids = suffix(), list(map(str, range(12)))
    whole = rows_of(kind, head, examples(), ids)
    for out in range(12):
        rest = [i for i in range(12) if i != out]
        fewer = rows_of(kind, head, examples(INPUTS[rest], LABELS[rest]), [ids[i] for i in rest])
        assert all(torch.equal(whole[i], row) for i, row in zip(rest, fewer, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_patient_more_moves_the_sum_by_the_clipping_norm_at_most(kind):
    """In whole numbers of the lattice, on which alone the noise lies."""
    _, size = choose_rows(kind, K, R)
    for ids in (list(map(str, range(12))), ["a"] * 6 + ["b"] * 6, ["a"] * 11 + ["b"]):
        rows = rows_of(kind, suffix(), examples(), ids)
        one = release(kind)
        sums = []
        for some in (rows, rows[:-1]):
            total = NoisedSum([torch.Size([size])], clip_norm=NORM[kind], noise_multiplier=1.0)
            for row in some:
                total.add([row])
            sums.append(total.sums[0].double())
        assert (sums[0] - sums[1]).norm() <= 2**36 / one.noise_multiplier


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_with_many_images_counts_as_one_with_the_mean_of_them(kind):
    rows = rows_of(kind, suffix(), examples(), ["a"] * 6 + ["b"] * 6)
    alone = torch.stack(rows_of(kind, suffix(), examples(), list(map(str, range(12)))))
    assert len(rows) == 2
    for row, own in zip(rows, (alone[:6], alone[6:]), strict=True):
        assert torch.allclose(row, own.mean(dim=0), atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_of_the_promised_size_and_told(kind):
    _, size = choose_rows(kind, K, R)
    told = [noise_rows([], release(kind, 2.0), size) for _ in range(2000)]
    drawn = np.concatenate([each.numbers for each in told])
    deviation = 2.0 * NORM[kind]
    assert {each.deviation for each in told} == {deviation}
    assert abs(drawn.std() / deviation - 1) < 6 / np.sqrt(2 * len(drawn))
    assert abs(drawn.mean()) < 6 * deviation / np.sqrt(len(drawn))


def test_an_image_whose_features_are_not_finite_adds_nothing():
    _, size = choose_rows("prototypes", K, R)

    class Silent(Entropy):
        def gaussians(self, shapes):
            return [torch.zeros(shape, dtype=torch.int64) for shape in shapes]

    bad = rows_of("prototypes", suffix(), examples(INPUTS * float("nan")), list("abcdefghijkl"))
    assert not noise_rows(bad, release("prototypes"), size, Silent()).numbers.any()
