"""Held-out patients: the right share, by patient, and the same ones for good."""

import numpy as np
import pytest

from client.data.records import ArrayImage, Record
from client.data.registry import guess_format
from client.data.splits import split_records
from common.config.study import Holdout
from common.errors import DataError

SECRET = bytes(range(32))
SKIN = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def record(patient, own=None):
    image = ArrayImage(np.zeros((4, 4), np.uint8), "image")
    return Record(image, 0, str(patient), own)


def many(count):
    """`count` patients with one to three images each."""
    return [record(patient) for patient in range(count) for _ in range(patient % 3 + 1)]


def ids(records):
    return {record.patient for record in records}


def cut(records, validation=0.15, test=0.2, secret=SECRET):
    parts = split_records(records, Holdout(validation=validation, test=test), secret)
    return ids(parts.train), ids(parts.validation), ids(parts.test)


def test_every_record_is_in_one_part_and_no_patient_in_two():
    records = many(3000)
    parts = split_records(records, Holdout(), SECRET)
    assert len(parts.train) + len(parts.validation) + len(parts.test) == len(records)
    train, validation, test = cut(records)
    assert not train & validation and not train & test and not validation & test  # noqa: PT018
    order = {id(record): place for place, record in enumerate(records)}
    assert [order[id(r)] for r in parts.train] == sorted(order[id(r)] for r in parts.train)


def test_shares_are_of_patients():
    train, validation, test = cut(many(20_000))
    assert len(test) == pytest.approx(4000, abs=4 * (20_000 * 0.2 * 0.8) ** 0.5)
    assert len(validation) == pytest.approx(3000, abs=4 * (20_000 * 0.15 * 0.85) ** 0.5)
    assert len(train) == 20_000 - len(test) - len(validation)


def test_a_patient_keeps_its_part_whoever_joins_or_leaves():
    few, more = many(500), many(900)
    for before, after in zip(cut(few), cut(more), strict=True):
        assert before == after & ids(few)
    assert cut(few[::-1]) == cut(few)


def test_changing_one_share_moves_nobody_of_the_other_part():
    records = many(2000)
    _, validation, test = cut(records)
    _, larger, same_test = cut(records, validation=0.3)
    assert same_test == test
    assert validation < larger
    _, same_validation, smaller = cut(records, test=0.1)
    assert same_validation == validation
    assert smaller < test


def test_no_share_holds_nobody_out():
    train, validation, test = cut(many(300), validation=0, test=0)
    assert (len(train), validation, test) == (300, set(), set())


def test_only_who_has_the_secret_can_tell():
    records = many(2000)
    ours, theirs = cut(records), cut(records, secret=b"another secret")
    # Independent cuts agree on a test patient by chance only: 20 % of 20 %.
    assert len(ours[2] & theirs[2]) == pytest.approx(80, abs=35)


def test_the_datas_own_split_wins():
    records = [record("a", "test"), record("b", "train"), record("a", "test"), record("c", "train")]
    assert cut(records, validation=0.5, test=0.4) == ({"b", "c"}, set(), {"a"})


def test_a_split_for_some_records_only():
    with pytest.raises(DataError, match="one in all rows or in none, got 1 of 3 without"):
        cut([record("a", "test"), record("b"), record("c", "train")])


def test_a_patient_in_two_splits():
    records = [record("a", "test"), record("a", "train"), record("b", "train")]
    with pytest.raises(DataError, match=r"got 1 of 2 patients in two or more\. Move all images"):
        cut(records)


@pytest.mark.parametrize("site", ["rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias"])
def test_real_sites(site, shared):
    records = guess_format(shared / "data/skin_sites" / site).records(SKIN)
    patients = len(ids(records))
    _, validation, test = cut(records)
    for part, share in ((validation, 0.15), (test, 0.2)):
        spread = 4 * (patients * share * (1 - share)) ** 0.5
        assert len(part) == pytest.approx(share * patients, abs=spread)
    half = records[::2]
    for before, after in zip(cut(half), cut(records), strict=True):
        assert before == after & ids(half)
