"""Every data format gives the same records, and says what is wrong in words one can act on."""

import contextlib
import csv
import time

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from client.data.image_folder import ImageFolder
from client.data.manifest import Manifest
from client.data.npz import Npz
from client.data.records import ArrayImage, FileImage
from client.data.registry import Data, guess_format
from common.config.yaml import YamlFile
from common.errors import DataError, SiteError
from common.model.images import Preprocess

CLASSES = ("benign", "malignant")
SMALL = Preprocess(12, 12, (0, 0, 0), (1, 1, 1))


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number)).save(path)
    return path


def table(root, rows, name="manifest.csv", encoding="utf-8"):
    with (root / name).open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)


def arrays(root, **changes):
    content = {}
    for split, start, count in (("train", 0, 4), ("val", 4, 2), ("test", 6, 2)):
        content[f"{split}_images"] = np.stack([pixels(start + i) for i in range(count)])
        content[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    path = root / "images.npz"
    np.savez_compressed(
        path, **{key: value for key, value in (content | changes).items() if value is not None}
    )
    return path


def make_image_folder(root):
    for number, name in enumerate(["benign/p1_a.png", "benign/p1_b.png", "malignant/p2_a.png"]):
        picture(root / name, number)
    return ImageFolder(root=root, patient=r"(p\d+)_")


def make_manifest(root):
    rows = [["image", "label", "patient", "age"]]
    for number, (label, patient) in enumerate([("benign", "p1"), ("malignant", "p2")]):
        picture(root / f"i/{number}.png", number)
        rows.append([f"i/{number}.png", label, patient, "7"])
    table(root, rows)
    return Manifest(root=root)


def make_npz(root):
    return Npz(root=arrays(root))


MAKERS = {"image_folder": make_image_folder, "manifest": make_manifest, "npz": make_npz}
every_format = pytest.mark.parametrize("name", MAKERS)


def test_every_format_has_a_conformance_case():
    options = TypeAdapter(Data).json_schema()["discriminator"]["mapping"]
    assert set(options) == set(MAKERS)


@every_format
def test_conformance(name, tmp_path):
    data = MAKERS[name](tmp_path)
    records = data.records(CLASSES)
    again = data.records(CLASSES)
    assert [r.image.name for r in records] == [r.image.name for r in again]
    assert {record.label for record in records} == {0, 1}
    assert len({record.image.name for record in records}) == len(records)
    for record in records:
        assert record.patient == record.patient.strip() != ""
        image = record.image.square(SMALL)
        assert image.dtype == torch.uint8
        assert image.shape == (3, 12, 12)
        assert record.image.square(SMALL.with_size(30)).shape == (3, 30, 30)
        assert len(record.image.digest()) == 64
    assert len({record.image.digest() for record in records}) == len(records)


@pytest.mark.parametrize("name", ["image_folder", "manifest"])
def test_labels_follow_the_studys_order_and_a_class_may_be_missing(name, tmp_path):
    data = MAKERS[name](tmp_path)
    turned = data.records(("malignant", "rare", "benign"))
    swap = {0: 2, 1: 0}
    assert [r.label for r in turned] == [swap[r.label] for r in data.records(CLASSES)]


@every_format
def test_unknown_labels_are_counted_in_one_error(name, tmp_path):
    with pytest.raises(DataError, match=r"study's classes benign, got .*\(\d\)"):
        MAKERS[name](tmp_path).records(("benign",))


@every_format
def test_only_listed_patients_are_used(name, tmp_path):
    data = MAKERS[name](tmp_path)
    chosen = data.records(CLASSES)[0].patient
    listed = tmp_path / "patients.txt"
    listed.write_text(f"\n  {chosen} \r\nsomebody else\n", encoding="utf-8")
    records = data.model_copy(update={"patients": listed}).records(CLASSES)
    assert {record.patient for record in records} == {chosen}
    listed.write_text("nobody", encoding="utf-8")
    with pytest.raises(DataError, match=r"none of the patients in .*patients\.txt"):
        data.model_copy(update={"patients": listed}).records(CLASSES)
    with pytest.raises(DataError, match="one patient id a line, got No such file"):
        data.model_copy(update={"patients": tmp_path / "absent.txt"}).records(CLASSES)


@every_format
def test_guess_knows_every_format(name, tmp_path):
    data = MAKERS[name](tmp_path)
    assert guess_format(tmp_path).format == name
    assert guess_format(data.root).root == data.root


def test_guess_says_what_it_looked_for(tmp_path):
    for place in (tmp_path, tmp_path / "absent", picture(tmp_path / "one.png")):
        with pytest.raises(SiteError, match=r"expected one \.npz file, a folder with"):
            guess_format(place)


@every_format
def test_absent_root_is_a_data_error(name, tmp_path):
    data = MAKERS[name](tmp_path)
    with pytest.raises(DataError, match="gone"):
        data.model_copy(update={"root": tmp_path / "gone"}).records(CLASSES)


# --- images ---------------------------------------------------------------------------------------


def test_digest_is_of_the_content(tmp_path):
    one, same = picture(tmp_path / "a.png", 1), picture(tmp_path / "b.png", 1)
    other = picture(tmp_path / "c.png", 2)
    assert FileImage(one).digest() == FileImage(same).digest() != FileImage(other).digest()
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert ArrayImage(grey, "a").digest() == ArrayImage(grey.copy(), "b").digest()
    assert ArrayImage(grey, "a").digest() != ArrayImage(grey.reshape(6, 4), "a").digest()


def test_unreadable_images_are_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(picture(tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"broken\.png: expected a readable image"):
        FileImage(path).square(SMALL)
    for missing in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(DataError, match=f"{missing.name}: expected a readable image"):
            FileImage(missing).square(SMALL)
        with pytest.raises(DataError, match=f"{missing.name}: expected a readable image"):
            FileImage(missing).digest()


# --- image_folder ---------------------------------------------------------------------------------


def test_image_folder_ignores_what_is_no_image_of_a_class(tmp_path):
    data = make_image_folder(tmp_path)
    before = data.records(CLASSES)
    picture(tmp_path / "stray.png")
    picture(tmp_path / ".cache/p9_a.png")
    picture(tmp_path / "benign/.p9_a.png")
    picture(tmp_path / "benign/.thumbs/p9_a.png")
    (tmp_path / "benign/notes.txt").write_text("p9_")
    (tmp_path / "documents").mkdir()
    assert data.records(CLASSES) == before
    deeper = picture(tmp_path / "benign/2024/p7_a.JPG")
    assert FileImage(deeper) in [record.image for record in data.records(CLASSES)]


def test_image_folder_without_a_pattern_takes_the_file_name_as_patient(tmp_path):
    make_image_folder(tmp_path)
    records = ImageFolder(root=tmp_path).records(CLASSES)
    assert [record.patient for record in records] == ["p1_a", "p1_b", "p2_a"]


def test_image_folder_without_a_pattern_takes_equal_names_for_one_patient(tmp_path):
    picture(tmp_path / "benign/1.png")
    picture(tmp_path / "malignant/1.jpg", 2)
    records = ImageFolder(root=tmp_path).records(CLASSES)
    assert [record.patient for record in records] == ["1", "1"]


def test_image_folder_patient_from_a_folder(tmp_path):
    picture(tmp_path / "benign/anna/1.png")
    picture(tmp_path / "malignant/anna/2.png", 2)
    records = ImageFolder(root=tmp_path, patient=r"^[^/]+/([^/]+)/").records(CLASSES)
    assert [record.patient for record in records] == ["anna", "anna"]


def test_image_folder_where_the_pattern_finds_no_patient(tmp_path):
    make_image_folder(tmp_path)
    for pattern in (r"benign/(p\d)", r"(p1)?_"):
        with pytest.raises(DataError, match=r"got 1 without, such as malignant/p2_a\.png"):
            ImageFolder(root=tmp_path, patient=pattern).records(CLASSES)


def test_image_folder_with_nothing_in_it(tmp_path):
    (tmp_path / "benign").mkdir()
    with pytest.raises(DataError, match="labelled images, got none"):
        ImageFolder(root=tmp_path).records(CLASSES)


# --- manifest -------------------------------------------------------------------------------------


def manifest(tmp_path, *rows, header=("image", "label", "patient"), **options):
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    table(tmp_path, [header, *rows], **options)
    return Manifest(root=tmp_path)


def test_manifest_keeps_other_columns_and_its_own_split(tmp_path):
    data = manifest(
        tmp_path,
        [" 0.png ", " benign", " Anna, B. ", "val", " 75 "],
        ["./1.png", "malignant", "b", "", ""],
        [],
        ["2.png", "benign", "c", "train", "x\ny"],
        header=("image", "label", "patient", "split", "age"),
        encoding="utf-8-sig",
    )
    first, second, third = data.records(CLASSES)
    assert (first.patient, first.split, first.columns) == ("Anna, B.", "validation", {"age": "75"})
    assert (second.split, second.label) == (None, 1)
    assert (third.split, third.columns) == ("train", {"age": "x\ny"})


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (["1.png", "", "p"], r"value in column 'label', got an empty one in 1 row \(line 3\)"),
        (["1.png", "benign", "  "], r"value in column 'patient', .* \(line 3\)"),
        (["", "benign", "p"], r"value in column 'image', .* \(line 3\)"),
        (["../1.png", "benign", "p"], r"below the data's root, .* \(line 3\)"),
        (["/etc/passwd", "benign", "p"], r"below the data's root, .* \(line 3\)"),
        (["a/../../1.png", "benign", "p"], r"below the data's root, .* \(line 3\)"),
        (["9.png", "benign", "p"], r"not there in 1 row \(line 3\)"),
        (["\0", "benign", "p"], r"manifest\.csv: expected"),
        (["./0.png", "benign", "p"], r"every image once, .* in 2 rows \(line 2, 3\)"),
        (["1.png", "benign"], r"3 cells in each row, .* \(line 3\)"),
        (["1.png", "benign", "p", "7"], r"3 cells in each row, .* \(line 3\)"),
        (["1.png", "harmless", "p"], r"benign, malignant, got 'harmless' \(1\)"),
    ],
)
def test_manifest_rows_that_cannot_be_used(tmp_path, row, complaint):
    data = manifest(tmp_path, ["0.png", "benign", "a"], row)
    with pytest.raises(DataError, match=complaint):
        data.records(CLASSES)


def test_manifest_counts_rows_and_shows_the_first(tmp_path):
    data = manifest(tmp_path, *[[f"{n}.png", "benign", ""] for n in range(9)])
    with pytest.raises(DataError, match=r"9 rows \(line 2, 3, 4, 5, 6, …\)"):
        data.records(CLASSES)


def test_manifest_with_an_unknown_split(tmp_path):
    data = manifest(
        tmp_path, ["0.png", "benign", "a", "dev"], header=("image", "label", "patient", "split")
    )
    with pytest.raises(DataError, match="train, validation, val, test or nothing"):
        data.records(CLASSES)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (["image", "label"], r"got image, label\. Missing: patient\."),
        (["image;label;patient"], r"Missing: image, label, patient\."),
        (["image", "label", "patient", "age", "age"], "each once"),
        ([], r"got an empty file"),
    ],
)
def test_manifest_with_a_wrong_header(tmp_path, header, complaint):
    with pytest.raises(DataError, match=complaint):
        manifest(tmp_path, header=header).records(CLASSES)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"image,label,patient\n\x9c,b,c\n", b'image,label,patient\n"0.png']
)
def test_manifest_that_is_no_csv(tmp_path, content):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(DataError, match="a readable UTF-8 CSV file"):
        Manifest(root=tmp_path).records(CLASSES)


def test_manifest_may_have_another_name(tmp_path):
    table(tmp_path, [["image", "label", "patient"], ["0.png", "benign", "a"]], name="list.csv")
    picture(tmp_path / "0.png")
    assert len(Manifest(root=tmp_path, manifest="list.csv").records(CLASSES)) == 1


# --- npz ------------------------------------------------------------------------------------------


def test_npz_brings_its_splits_and_numbers_its_patients(tmp_path):
    records = make_npz(tmp_path).records(CLASSES)
    assert [record.split for record in records] == (
        ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    )
    assert [record.patient for record in records][3:5] == ["train-3", "val-0"]
    np.testing.assert_array_equal(records[0].image.square(SMALL).permute(1, 2, 0), pixels(0))


def test_npz_grey_becomes_rgb_and_flat_labels_are_fine(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (2, 5, 7), dtype=np.uint8)
    path = arrays(tmp_path, test_images=grey, test_labels=np.array([1, 0]))
    last = Npz(root=path).records(CLASSES)[-1]
    assert last.label == 0
    centre = torch.from_numpy(grey[1, :, 1:6]).expand(3, 5, 5)
    assert torch.equal(last.image.square(SMALL.with_size(5)), centre)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"val_images": None}, "others only"),
        ({"val_images": np.zeros((2, 5, 5), np.float32)}, r"val_images: .*got float32 \[2, 5, 5\]"),
        ({"val_images": np.zeros((2, 5, 5, 5), np.uint8)}, r"val_images: .*got uint8"),
        ({"val_images": np.zeros(2, np.uint8)}, r"val_images: .*got uint8 \[2\]"),
        ({"val_labels": np.zeros((3, 1), np.int64)}, r"val_labels: .*2 integer labels"),
        ({"val_labels": np.zeros((2, 14), np.int64)}, r"val_labels: .*2 integer labels"),
        ({"val_labels": np.zeros(2)}, r"val_labels: .*2 integer labels"),
        ({"val_labels": np.array([0, -1])}, r"'number -1' \(1\)"),
        ({"val_labels": np.array([{"a": 1}, 2], dtype=object)}, "allow_pickle=False"),
    ],
)
def test_npz_in_another_layout(tmp_path, changes, complaint):
    with pytest.raises(DataError, match=complaint):
        Npz(root=arrays(tmp_path, **changes)).records(CLASSES)


def test_npz_a_number_is_never_mistaken_for_a_class_of_that_name(tmp_path):
    path = arrays(tmp_path, val_labels=np.array([0, 7]))
    with pytest.raises(DataError, match="'number 7'"):
        Npz(root=path).records(("7", "8"))


def test_npz_is_in_memory_once_until_the_file_changes(tmp_path):
    path = arrays(tmp_path)
    first, again = (Npz(root=path).records(CLASSES)[0].image.array for _ in range(2))
    assert np.shares_memory(first, again)
    with pytest.raises(ValueError, match="read-only"):
        first[:] = 0
    arrays(tmp_path, train_images=np.zeros((4, 9, 9), np.uint8))
    assert Npz(root=path).records(CLASSES)[0].image.array.shape == (9, 9)


def test_npz_that_is_damaged(tmp_path):
    path = arrays(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-200], whole[: len(whole) // 2], b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"expected an \.npz archive"):
            Npz(root=path).records(CLASSES)
    random = np.random.default_rng(0)
    for _ in range(200):
        bent = bytearray(whole)
        bent[random.integers(0, len(whole))] ^= 1 << random.integers(0, 8)
        path.write_bytes(bytes(bent))
        with contextlib.suppress(DataError):
            Npz(root=path).records(CLASSES)


# --- in a YAML file -------------------------------------------------------------------------------


class File(YamlFile):
    name: str
    data: Data
    pools: list[Data] = []


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {"format": "manifest", "root": "x", "rot": "x"},
            r"f: data\.rot: expected a known key, got 'rot'\. Did you mean 'root'\?",
        ),
        ({"format": "manifest", "root": "x", "patient": "x"}, "Did you mean 'patients'"),
        ({"format": "npz", "root": "x", "manifest": "x"}, r"f: data\.manifest: .*known key"),
        ({"format": "npz"}, r"f: data\.root: expected a value, got nothing"),
        ({"root": "x"}, r"f: data\.format: expected a value, got nothing"),
        (
            {"format": "manifst", "root": "x"},
            r"f: data\.format: expected 'image_folder', .*, got 'manifst'\. .*'manifest'\?",
        ),
        ({"format": "npz", "root": 5}, r"f: data\.root: expected a path, got 5"),
        ("here", r"f: data: expected a mapping of keys to values, got 'here'"),
        (
            {"format": "image_folder", "root": "x", "patient": "("},
            r"f: data\.patient: expected a regular expression",
        ),
        (
            {"format": "image_folder", "root": "x", "patient": "p."},
            r"f: data\.patient: expected a group",
        ),
    ],
)
def test_mistakes_in_a_data_section_name_the_key_as_written(data, complaint):
    with pytest.raises(SiteError, match=complaint):
        File.parse({"name": "a", "data": data}, "f", SiteError)


def test_mistakes_in_a_list_of_data_sections():
    good = {"format": "npz", "root": "x"}
    content = {"name": "a", "data": good, "pools": [good, {"format": "manifest", "rot": "x"}]}
    with pytest.raises(SiteError, match=r"f: pools\.1\.rot: .*Did you mean 'root'"):
        File.parse(content, "f", SiteError)


# --- speed and real data --------------------------------------------------------------------------


def test_listing_thousands_of_images_decodes_none_and_is_quick(tmp_path):
    rows = [["image", "label", "patient"]]
    for number in range(4000):
        name = f"{CLASSES[number % 2]}/{number}.jpg"
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()  # nothing to decode
        rows.append([name, CLASSES[number % 2], str(number)])
    table(tmp_path, rows)
    start = time.process_time()
    assert len(Manifest(root=tmp_path).records(CLASSES)) == 4000
    assert len(ImageFolder(root=tmp_path).records(CLASSES)) == 4000
    assert time.process_time() - start < 5


SKIN = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


@pytest.mark.parametrize(
    ("site", "images"),
    [("rosendahl", 1008), ("vidir_modern", 1075), ("vidir_molemax", 2516), ("vienna_dias", 174)],
)
def test_real_manifests(site, images, shared):
    records = guess_format(shared / "data/skin_sites" / site).records(SKIN)
    assert len(records) == images
    assert set(records[0].columns) == {"age", "sex", "localization"}
    assert records[-1].image.square(SMALL.with_size(224)).shape == (3, 224, 224)


def test_real_npz(shared):
    records = guess_format(shared / "data/pneumoniamnist").records(("normal", "pneumonia"))
    splits = [record.split for record in records]
    assert [splits.count(s) for s in ("train", "validation", "test")] == [4708, 524, 624]
    assert sum(record.label for record in records if record.split == "train") == 3494
    assert records[0].image.square(SMALL.with_size(28)).shape == (3, 28, 28)
