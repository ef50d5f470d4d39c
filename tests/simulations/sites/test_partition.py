"""Virtual hospitals: every patient at exactly one, as alike or unlike as asked."""

import numpy as np
import pytest

from client.data.records import ArrayImage, Record
from common.errors import StudyError
from simulations.sites.partition import cut_patients, label_patients, parse_partition

SPECS = ["iid", "dirichlet:0.1", "dirichlet:1", "dirichlet:100", "label:2", "label:5", "quantity:1"]


def pool(count=1000, classes=5):
    """Patients of classes of different frequency."""
    labels = np.random.default_rng(0).geometric(0.4, count) % classes
    return {f"patient {number}": int(label) for number, label in enumerate(labels)}


def table(labels, sites):
    """Patients by site and class."""
    counts = np.zeros((len(sites), max(labels.values()) + 1), int)
    for number, patients in enumerate(sites):
        for patient in patients:
            counts[number, labels[patient]] += 1
    return counts


def everyone(sites):
    return sorted(patient for patients in sites for patient in patients)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("sites", [3, 40])
def test_complete_disjoint_and_none_empty(spec, sites):
    labels = pool()
    cut = cut_patients(labels, sites, spec, seed=1)
    assert len(cut) == sites
    assert all(cut)
    assert everyone(cut) == sorted(labels)


@pytest.mark.parametrize("spec", SPECS)
def test_seeded_and_independent_of_the_order_of_patients(spec):
    labels = pool()
    cut = cut_patients(labels, 4, spec, seed=1)
    assert cut == cut_patients(dict(reversed(labels.items())), 4, spec, seed=1)
    assert cut != cut_patients(labels, 4, spec, seed=2)


def test_iid_sites_are_alike_and_of_equal_size():
    labels = pool(5000)
    counts = table(labels, cut_patients(labels, 10, "iid", seed=0))
    assert set(counts.sum(1)) == {500}
    expected = counts.sum(0) / 10
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def skew(spec):
    """Mean distance in total variation between a site's class mix and the pool's."""
    labels = pool(5000)
    counts = table(labels, cut_patients(labels, 10, spec, seed=0))
    mix, whole = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    return np.abs(mix - whole).sum(1).mean() / 2


def test_a_smaller_alpha_makes_sites_less_alike():
    steps = [skew(f"dirichlet:{alpha}") for alpha in (0.05, 0.5, 5, 500)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 0.5
    assert steps[-1] < 0.05


def test_dirichlet_shares_have_the_moments_of_a_dirichlet():
    """Over many seeds, a site's share of one class has mean 1/n and the variance of Beta(α, …)."""
    labels = dict.fromkeys(map(str, range(1000)), 0)
    sites, alpha = 4, 2.0
    shares = np.array(
        [
            [len(site) / 1000 for site in cut_patients(labels, sites, f"dirichlet:{alpha}", seed)]
            for seed in range(400)
        ]
    )
    assert shares.mean(0) == pytest.approx(np.full(sites, 0.25), abs=0.03)
    variance = (1 / sites) * (1 - 1 / sites) / (sites * alpha + 1)
    assert shares.var(0).mean() == pytest.approx(variance, rel=0.15)


def test_label_sites_see_at_most_k_classes_and_share_each_evenly():
    labels = pool()
    for k in (1, 2, 3):
        counts = table(labels, cut_patients(labels, 10, f"label:{k}", seed=3))
        assert ((counts > 0).sum(1) <= k).all()
        for column in counts.T:
            assert np.ptp(column[column > 0]) <= 1


def test_quantity_sites_differ_in_size_only():
    labels = pool(5000)
    counts = table(labels, cut_patients(labels, 5, "quantity:0.7", seed=0))
    sizes = counts.sum(1)
    assert sizes.max() > 3 * sizes.min()
    expected = sizes[:, None] * counts.sum(0) / counts.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


@pytest.mark.parametrize("spec", ["iid", "dirichlet:5", "label:1", "quantity:5"])
def test_which_patients_of_a_class_a_site_gets_is_random(spec):
    labels = dict.fromkeys((f"{number:04}" for number in range(1000)), 0)
    for site in cut_patients(labels, 4, spec, seed=0):
        spread = 5 * 1000 / (12 * len(site)) ** 0.5
        assert np.mean([int(patient) for patient in site]) == pytest.approx(500, abs=spread)


def test_as_many_sites_as_patients():
    labels = pool(12, classes=3)
    for spec in ("iid", "dirichlet:0.1", "label:1", "quantity:0.1"):
        assert [len(site) for site in cut_patients(labels, 12, spec, seed=0)] == [1] * 12


@pytest.mark.parametrize("alpha", ["1e-320", "1e-9", "1e9", "1e300"])
def test_extreme_alphas_still_place_everybody(alpha):
    labels = pool(50)
    for kind in ("dirichlet", "quantity"):
        cut = cut_patients(labels, 5, f"{kind}:{alpha}", seed=0)
        assert everyone(cut) == sorted(labels)
        assert all(cut)


def test_by_patient():
    image = ArrayImage(np.zeros((4, 4), np.uint8), "image")
    seen = [("a", 2), ("b", 1), ("a", 2), ("a", 0), ("b", 0), ("c", 1)]
    records = [Record(image, label, patient) for patient, label in seen]
    assert label_patients(records) == {"a": 2, "b": 0, "c": 1}
    cut = cut_patients(label_patients(records), 2, "dirichlet:1", seed=0)
    assert everyone(cut) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "spec",
    [
        *["", "iid:3", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:nan"],
        *["dirichlet:inf", "quantity:x", "label:1.5", "label:0", "natural"],
    ],
)
def test_bad_specs_name_the_good_ones(spec):
    with pytest.raises(StudyError, match="partition: expected iid, dirichlet:<α>, label:<k> or"):
        parse_partition(spec)


def test_a_near_miss_is_named():
    with pytest.raises(StudyError, match=r"got 'dirichelt:1'\. Did you mean 'dirichlet'\?"):
        parse_partition("dirichelt:1")


@pytest.mark.parametrize("sites", [0, -1, 1001])
def test_more_sites_than_patients(sites):
    with pytest.raises(StudyError, match="sites: expected 1 to 1000 sites"):
        cut_patients(pool(), sites, "iid", seed=0)


@pytest.mark.parametrize(("sites", "k"), [(2, 2), (3, 1), (3, 6)])
def test_label_that_cannot_cover_the_classes(sites, k):
    with pytest.raises(StudyError, match=rf"label:{k}: expected every one of 5 .* Take k from"):
        cut_patients(pool(), sites, f"label:{k}", seed=0)
