"""A study file is exactly what it says; what does not fit is refused by name, in plain words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.study import Study
from common.errors import StudyError
from tests.builders import CONFIGS, make_study

BASE = """
name: lesions
classes: [benign, malignant]
model: {backbone: squeezenet1_1, weights: none}
train: {rounds: 3}
"""

# What one change makes of the base, and every word the complaint must hold.
WRONG: dict[str, tuple[str, str, list[str]]] = {
    "unknown key": ("trian", "1", ["trian", "a known key", "Did you mean 'train'?"]),
    "unknown key, one down": ("train.roundz", "1", ["train.roundz", "Did you mean 'rounds'?"]),
    "unknown key, two down": (
        "images.augment.view",
        "3",
        ["images.augment.view", "Did you mean 'views'?"],
    ),
    "unknown key, near nothing": ("holdout.zzz", "1", ["holdout.zzz", "Known: test, validation"]),
    "a key that is no word": ("7", "1", ["study.yaml: 7", "a known key"]),
    "text for a number": ("train.rounds", "many", ["train.rounds", "integer", "'many'"]),
    "nothing for a number": ("train.rounds", "", ["train.rounds", "integer", "got null"]),
    "a fraction of a round": ("train.rounds", "2.5", ["train.rounds", "integer", "2.5"]),
    "a number for text": ("name", "7", ["name", "text", "7"]),
    "YAML's no": ("classes", "[no, malignant]", ["classes.0", "quotes", "False"]),
    "a word for a list": ("classes", "benign", ["classes", "a list", "'benign'"]),
    "a list for a section": ("holdout", "[1]", ["holdout", "a mapping of keys to values", "[1]"]),
    "a word for a section": ("train", "fast", ["train", "a mapping of keys to values", "'fast'"]),
    "endless rounds": ("train.rounds", "100001", ["train.rounds", "100000"]),
    "endless epochs": ("train.local_epochs", "1000000000", ["train.local_epochs", "1000"]),
    "endless steps": ("train.local_steps", "1000001", ["train.local_steps", "1000000"]),
    "endless batch": ("train.batch_size", "65537", ["train.batch_size", "65536"]),
    "endless patience": ("train.patience", "100001", ["train.patience", "100000"]),
    "endless seed": ("seed", str(2**63), ["seed", str(2**63)]),
    "endless classes": ("classes", str([f"c{i}" for i in range(1001)]), ["classes", "1000 items"]),
    "endless views": (
        "images",
        "{size: 1024, augment: {views: 17, ops: [flip]}}",
        ["images", "16 of 1024, got 17 of 1024"],
    ),
    "endless depth": ("model.unfreeze", "last:1000", ["model.unfreeze", "last:<k>"]),
    "endless words": ("model.backbone", "x" * 101, ["model.backbone", "100 characters"]),
    "truth for rounds": ("train.rounds", "true", ["train.rounds", "integer", "True"]),
    "truth for views": ("images.augment.views", "yes", ["augment.views", "integer", "True"]),
    "truth for a rate": ("train.lr", "true", ["train.lr", "a number, got True"]),
    "truth for a share": ("holdout.test", "false", ["holdout.test", "a number, got False"]),
    "truth for an option": ("aggregate.options.eta", "true", ["options.eta", "number, got True"]),
    "truth for a weight": ("train.class_weights", "[1, true]", ["class_weights.1", "got True"]),
    "an empty class": ("classes", "[benign, ' ']", ["classes.1", "printable characters, got ' '"]),
    "a class in two lines": ("classes", '[benign, "a\\nb"]', ["classes.1", "printable"]),
    "a class that rings": ("classes", '[benign, "\\a"]', ["classes.1", "printable"]),
    "an endless class": ("classes", f"[benign, {'x' * 101}]", ["classes.1", "1 to 100"]),
    "no rounds": ("train.rounds", "0", ["train.rounds", "1 or more", "0"]),
    "negative rate": ("train.lr", "-1.0", ["train.lr", "greater than 0", "-1.0"]),
    "NaN rate": ("train.lr", ".nan", ["train.lr", "a finite number", "nan"]),
    "infinite decay": ("train.weight_decay", ".inf", ["train.weight_decay", "finite", "inf"]),
    "NaN option": ("aggregate.options.eta", ".nan", ["aggregate.options.eta", "finite", "nan"]),
    "NaN class weight": ("train.class_weights", "[1, .nan]", ["train.class_weights.1", "finite"]),
    "NaN holdout": ("holdout.test", ".nan", ["holdout.test", "nan"]),
    "all dropped out": ("model.dropout", "1.0", ["model.dropout", "less than 1", "1.0"]),
    "near miss of a word": (
        "select",
        "acuracy",
        ["select", "'acuracy'", "Did you mean 'accuracy'?"],
    ),
    "near miss in a list": ("images.augment", "{views: 2, ops: [flop]}", ["ops.0", "mean 'flip'?"]),
    "unknown mechanism": (
        "privacy.mechanism",
        "magic",
        ["privacy.mechanism", "'none'", "'dp_sgd'", "'magic'"],
    ),
    "near miss of a mechanism": ("privacy.mechanism", "dp-sgd", ["Did you mean 'dp_sgd'?"]),
    "no mechanism": ("privacy", "{epsilon: 8.0}", ["privacy.mechanism", "got nothing"]),
    "ε without a mechanism": (
        "privacy",
        "{mechanism: none, epsilon: 8.0}",
        ["privacy.epsilon", "a known key"],
    ),
    "depth": ("model.unfreeze", "last:0", ["model.unfreeze", "head, last:<k> or all", "'last:0'"]),
    "depth in words": ("model.unfreeze", "tail", ["model.unfreeze", "head, last:<k> or all"]),
    "one class": ("classes", "[benign]", ["classes", "at least 2"]),
    "a class twice": ("classes", "[benign, benign]", ["distinct class names, got 'benign' twice"]),
    "null for a section": ("images.augment", "null", ["of keys to values, got null. Write {} for"]),
    "null for a mapping": ("aggregate.options", "null", ["of keys to values, got null. Write {}"]),
    "null for a number": ("seed", "null", ["seed: expected a valid integer, got null. Remove"]),
    "a path as name": ("name", "../lesions", ["name", "'../lesions'"]),
    "tiny images": ("images.size", "8", ["images.size", "greater than or equal to 32", "8"]),
    "two lengths": (
        "train",
        "{rounds: 1, local_epochs: 1, local_steps: 5}",
        ["train", "local_epochs or local_steps, got both", "Remove one"],
    ),
    "two weightings": (
        "train",
        "{rounds: 1, class_weights: [1, 2], imbalance: weighted}",
        ["train", "class_weights or imbalance: weighted, got both"],
    ),
    "class weights of another number": (
        "train.class_weights",
        "[1, 2, 3]",
        ["train.class_weights", "one number per class (2)", "got 3"],
    ),
    "views without ops": (
        "images.augment.views",
        "4",
        ["images.augment", "views > 1 and some ops", "got views: ", "Write augment: {} for none"],
    ),
    "ops without views": ("images.augment.ops", "[flip]", ["images.augment", "views > 1 and some"]),
    "nothing left to train on": (
        "holdout",
        "{validation: 0.5, test: 0.5}",
        ["holdout", "validation + test < 1"],
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *changes: str) -> str:
    with pytest.raises(StudyError) as caught:
        Study.read(path, changes)
    return str(caught.value)


def put(content: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
    content[last] = value


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_the_file_is_named(case: str, tmp_path: Path) -> None:
    key, value, words = WRONG[case]
    content = yaml.safe_load(BASE)
    put(content, key, yaml.safe_load(value))
    path = write(tmp_path, yaml.safe_dump(content))
    told = refusal(path)
    assert all(line.startswith(f"{path}: ") or line == str(path) for line in told.splitlines())
    assert "expected" in told
    assert [word for word in words if word not in told] == []


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_change_is_named(case: str, tmp_path: Path) -> None:
    key, value, words = WRONG[case]
    path = write(tmp_path, BASE)
    told = refusal(path, f"{key}={value}")
    assert [word for word in words if word not in told] == []


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    told = refusal(write(tmp_path, "name: a b\nclases: [x]\ntrain: {rounds: -1, lr: .nan, x: 1}\n"))
    lines = told.splitlines()
    keys = {"name", "clases", "classes", "model", "train.rounds", "train.lr", "train.x"}
    assert {line.split(": ")[1] for line in lines} == keys
    assert len(lines) == len(keys)


@pytest.mark.parametrize("key", ["name", "classes", "model", "train", "train.rounds"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    content = yaml.safe_load(BASE)
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    del place[last]
    told = refusal(write(tmp_path, yaml.safe_dump(content)))
    assert f"{key}: expected a value, got nothing. Add the key." in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- name\n- classes\n", "a mapping of keys to values, got list"),
        ("", "a mapping of keys to values, got NoneType"),
        ("just words", "a mapping of keys to values, got str"),
        ("name: [unclosed", "valid YAML"),
        ("name: a: b", "valid YAML"),
        ("\tname: x", "valid YAML"),
        ("name: \x00", "valid YAML"),
        (f"{BASE}---{BASE}", "valid YAML"),
        (f"{BASE}seed: !!python/object/apply:os.getpid []", "valid YAML"),
        (f"{BASE}seed: 2024-13-45", "valid YAML"),
        (f"{BASE}seed: {'9' * 5000}", "valid YAML"),
        (f"{BASE}seed: {'[' * 1500}", "valid YAML"),
        (f"{BASE}name: other", "the key 'name' twice"),
        (f"{BASE}holdout: {{test: 0.1, test: 0.2}}", "the key 'test' twice"),
        (f"{BASE}1: x", "a word as key"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    told = refusal(path)
    assert told.startswith(f"{path}: ")
    assert f"expected {words}" in told or words in told


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert (
        refusal(missing)
        == f"{missing}: expected a readable YAML file, got No such file or directory"
    )
    assert "Is a directory" in refusal(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x80name")
    assert refusal(binary) == f"{binary}: expected a readable YAML file, got not UTF-8 text"


def test_changes_replace_add_and_come_in_order(tmp_path: Path) -> None:
    changes = (
        "train.rounds=5",
        "train.rounds=9",  # the last word counts
        "train.lr=1e-2",
        "images.size=64",
        "images.augment={views: 2, ops: [flip]}",
        "images.augment.views=3",
        "aggregate.options.proximal_mu=0.5",
        "classes=[a, b, c]",
        "name=x",
    )
    study = Study.read(write(tmp_path, BASE), changes)
    assert (study.train.rounds, study.train.lr, study.images.size) == (9, 0.01, 64)
    assert (study.images.augment.views, study.images.augment.ops) == (3, ("flip",))
    assert study.aggregate.options == {"proximal_mu": 0.5}
    assert (study.classes, study.name) == (("a", "b", "c"), "x")
    assert study.model.backbone == "squeezenet1_1"  # the rest is as written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.rounds", "--set: expected key=value, got 'train.rounds'"),
        ("=5", "--set: expected key=value, got '=5'"),
        ("", "--set: expected key=value, got ''"),
        ("train.rounds=[", "--set train.rounds: expected a YAML value, got '['"),
        ("seed=2024-13-45", "--set seed: expected a YAML value, got '2024-13-45'"),
        ("train..rounds=5", "train.: expected a known key, got ''"),
        ("model.backbone.x=1", "model.backbone: expected text"),
        ("no.such.key=1", "no: expected a known key"),
    ],
)
def test_bad_changes_are_refused(change: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path, BASE), change)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_parse(path: Path) -> None:
    study = Study.read(path)
    assert study.model.weights_file is not None
    assert study.model.weights_file.is_absolute()
    assert Study.model_validate_json(study.proposal()).id == study.id


def test_three_studies_are_shipped() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"chest", "demo", "skin"}


def test_a_study_cannot_be_changed() -> None:
    study = Study.model_validate(yaml.safe_load(BASE))
    with pytest.raises(ValueError, match="frozen"):
        study.train.rounds = 5  # type: ignore[misc]


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    study = Study.read(write(tmp_path, BASE), ("train.lr=1e-2", "images.size=64"))
    again = Study.read(write(tmp_path, study.yaml()))
    assert again == study
    assert again.id == study.id


def test_weights_are_relative_to_the_study(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    study = Study.read(path, ("model.weights=../w/net.pth",))
    assert study.model.weights_file == (tmp_path / "../w/net.pth").resolve()
    assert Study.read(path, ("model.weights=DEFAULT",)).model.weights_file is None
    assert Study.read(path).model.weights == "none"


def test_the_proposal_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    changes = ("model.weights=secret-folder/net.pth", "model.init=secret-run/best")
    study = Study.read(path, changes)
    assert str(tmp_path) in study.model.weights
    assert study.model.init is not None
    shown = study.proposal()
    model = json.loads(shown)["model"]
    assert (model["weights"], model["init"]) == ("net.pth", "zero")
    for private in (str(tmp_path), str(Path.cwd()), "secret", "/", "study.yaml"):
        assert private not in shown


def test_the_id_depends_on_the_proposal_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here, there = write(tmp_path, BASE), write(tmp_path / "elsewhere", BASE)
    change = "model.weights=net.pth"
    assert Study.read(here, (change,)).id == Study.read(there, (change,)).id
    run, zero = (Study.read(here, (change, f"model.init={init}")) for init in ("run", "zero"))
    assert run.id == zero.id
    spelled = Study.read(here, (change, "seed=0", "train.batch_size=32", "images.size="))
    assert spelled.id == Study.read(here, (change,)).id


OTHER = {
    "name": "nevi",
    "classes": ["malignant", "benign"],
    "model.backbone": "resnet18",
    "model.weights": "DEFAULT",
    "model.unfreeze": "last:1",
    "model.dropout": 0.1,
    "model.feature_mean": [0.5],
    "model.unit_features": False,
    "model.precision": "bfloat16",
    "images.size": 64,
    "images.unreadable": "skip",
    "images.augment.views": 3,
    "images.augment.ops": ["rotate"],
    "train.rounds": 4,
    "train.local_epochs": 2,
    "train.local_steps": 2,
    "train.batch_size": 8,
    "train.optimizer": "sgd",
    "train.lr": 0.01,
    "train.momentum": 0.5,
    "train.weight_decay": 0.01,
    "train.schedule": "cosine",
    "train.imbalance": "focal",
    "train.class_weights": [1, 2],
    "train.patience": 2,
    "holdout.validation": 0.2,
    "holdout.test": 0.3,
    "select": "auroc",
    "aggregate.strategy": "fedprox",
    "aggregate.options": {"proximal_mu": 0.1},
    "aggregate.fraction": 0.5,
    "aggregate.quorum": 2,
    "aggregate.max_weight": 2.0,
    "aggregate.round_timeout": 60,
    "adapt": False,
    "card.intended_use": "Second reading.",
    "card.label_source": "Histology.",
    "card.contact": "registry@example.org",
    "card.license": "CC BY 4.0",
    "privacy.mechanism": None,  # another one brings keys of its own
    "model.head": None,  # another one has no rounds
    "seed": 1,
}
PLAIN = {**yaml.safe_load(BASE), "images": {"augment": {"views": 2, "ops": ["flip"]}}}


def leaves(content: dict[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in content.items():
        inner = isinstance(value, dict) and key != "options"
        keys |= leaves(value, f"{prefix}{key}.") if inner else {prefix + key}
    return keys


def test_every_key_is_has_another_value_here() -> None:
    assert leaves(Study.model_validate(PLAIN).model_dump()) == set(OTHER) | {"model.init"}


@pytest.mark.parametrize("key", [key for key, value in OTHER.items() if value is not None])
def test_the_id_changes_with_every_key_that_matters(key: str) -> None:
    changed = json.loads(json.dumps(PLAIN))
    put(changed, key, OTHER[key])
    assert Study.model_validate(changed).id != Study.model_validate(PLAIN).id


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    study = Study.model_validate(
        yaml.safe_load(BASE) | {"train": {"rounds": 100_000, "lr": "1e-3", "weight_decay": 1}}
    )
    assert (study.train.lr, study.train.weight_decay) == (1e-3, 1.0)


# --- privacy ---

PRIVATE = {
    **yaml.safe_load(BASE),
    "privacy": {"mechanism": "dp_sgd", "epsilon": 8.0, "delta": 1e-5},
}


def test_a_private_study_is_one_that_names_a_mechanism() -> None:
    assert not Study.model_validate(PLAIN).private
    study = Study.model_validate(PRIVATE)
    assert study.private
    assert study.id != Study.model_validate(yaml.safe_load(BASE)).id
    assert Study.model_validate_json(study.proposal()) == study


@pytest.mark.parametrize(
    ("key", "value"), [("epsilon", 7.9), ("delta", 1e-6), ("clip_norm", 0.5), ("spare_rounds", 0)]
)
def test_the_id_changes_with_every_number_of_privacy(key: str, value: float) -> None:
    changed = PRIVATE | {"privacy": PRIVATE["privacy"] | {key: value}}
    assert Study.model_validate(changed).id != Study.model_validate(PRIVATE).id
    assert {*PRIVATE["privacy"], "clip_norm", "spare_rounds"} == set(
        Study.model_validate(PRIVATE).privacy.model_dump()
    )


HEAD = {
    "name": "head",
    "classes": ["a", "b"],
    "model": {"backbone": "squeezenet1_0"},
    "privacy": {"preset": "head", "epsilon": 8.0, "delta": 1e-5},
}


def test_a_preset_fills_in_what_the_study_does_not_say() -> None:
    study = Study.model_validate(HEAD)
    assert (study.privacy.mechanism, study.model.head) == ("gaussian", "discriminant")
    assert study.model.unit_features
    assert (study.train.rounds, study.directions) == (0, 48)
    assert Study.model_validate_json(study.proposal()).id == study.id
    fewer = Study.model_validate(HEAD | {"privacy": HEAD["privacy"] | {"directions": 16}})
    assert fewer.directions == 16
    assert fewer.id != study.id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": HEAD["privacy"] | {"mechanism": "dp_sgd"}}, "gaussian with preset: head"),
        ({"train": {"rounds": 3}}, "train.rounds: 0"),
        ({"model": HEAD["model"] | {"head": "linear"}}, "head: discriminant"),
        ({"model": HEAD["model"] | {"head": "ridge"}}, "model.head: discriminant with preset"),
        ({"privacy": HEAD["privacy"] | {"preset": "heads"}}, "privacy.preset: head, got heads"),
        ({"model": HEAD["model"] | {"unfreeze": "last:1"}}, "unfreeze: head"),
        ({"privacy": HEAD["privacy"] | {"directions": 1}}, "greater than or equal to 2"),
        ({"privacy": HEAD["privacy"] | {"clip_norm": 1.0}}, "clip_norm"),
    ],
)
def test_what_a_private_head_cannot_be_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Study.model_validate(HEAD | changes)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epsilon", 0, "greater than 0, got 0"),
        ("epsilon", float("inf"), "a finite number"),
        ("epsilon", True, "a number, got True"),
        ("delta", 0, "greater than 0, got 0"),
        ("epsilon", 1e9, "at most 100, got 1e+09. So large an ε protects nobody"),
        ("delta", 0.01, "at most 0.001, got 0.01. δ is the chance that nothing protects"),
        ("clip_norm", 1e-30, "greater than or equal to 0.001"),
        ("clip_norm", 1e30, "less than or equal to 1000"),
        ("clip_norm", float("nan"), "a finite number"),
        ("spare_rounds", -1, "greater than or equal to 0"),
        ("spare_rounds", 0.5, "integer"),
        ("clipnorm", 1.0, "a known key, got 'clipnorm'. Did you mean 'clip_norm'?"),
        ("noise", 1.0, "a known key, got 'noise'"),
    ],
)
def test_what_is_wrong_in_privacy_is_named(
    key: str, value: object, words: str, tmp_path: Path
) -> None:
    content = PRIVATE | {"privacy": PRIVATE["privacy"] | {key: value}}
    told = refusal(write(tmp_path, yaml.safe_dump(content)))
    assert f"privacy.{key}: expected" in told
    assert words in told


@pytest.mark.parametrize("key", ["epsilon", "delta"])
def test_what_privacy_cannot_do_without_is_asked_for(key: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(PRIVATE))
    del content["privacy"][key]
    told = refusal(write(tmp_path, yaml.safe_dump(content)))
    assert told.endswith(f"privacy.{key}: expected a value, got nothing. Add the key.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "train.imbalance=weighted",
            ["train.imbalance", "got weighted", "come from patients", "class_weights to constants"],
        ),
        ("train.patience=3", ["no train.patience", "got 3", "No round is scored"]),
    ],
)
def test_what_patients_would_decide_is_refused_under_privacy(
    change: str, words: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, yaml.safe_dump(PRIVATE))
    told = refusal(path, change)
    assert [word for word in words if word not in told] == []
    assert told.startswith(f"{path}: ")
    Study.read(path, ("train.class_weights=[1, 2]", "train.imbalance=focal"))
    Study.read(write(tmp_path, BASE), (change,))  # without privacy there is nothing to protect


# --- heads that are solved ---


def test_a_solved_head_needs_no_rounds_and_reads_unit_features() -> None:
    study = make_study(model={"head": "discriminant", "init": None}, train={"rounds": 0})
    assert study.model.unit_features
    assert study.model.solved_head == "discriminant"
    begins = make_study(model={"backbone": "resnet18", "init": "solved"})
    assert (begins.model.solved_head, begins.model.unit_features) == ("discriminant", True)
    assert begins.model.init_run is None
    assert make_study().model.solved_head is None


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (
            {"head": "discriminant"},
            {"train": {"rounds": 3}},
            "train.rounds: 0 with model.head: discriminant, got 3",
        ),
        ({}, {"train": {"rounds": 0}}, "train.rounds: 1 or more"),
        ({"head": "ridge", "unfreeze": "last:1"}, {"train": {"rounds": 0}}, "unfreeze: head"),
        ({"head": "ridge", "init": "solved"}, {"train": {"rounds": 0}}, "no init"),
        ({"init": "solved", "unit_features": False}, {}, "unit_features: true"),
        ({"init": "solved"}, {"privacy": PRIVATE["privacy"]}, "preset: head with privacy"),
        ({"head": "quadratic"}, {}, "'linear', 'discriminant' or 'ridge'"),
    ],
)
def test_what_a_solved_head_cannot_be_is_said(model, changes, said) -> None:
    with pytest.raises(StudyError, match=re.escape(said)):
        make_study(model={"backbone": "resnet18"} | model, **changes)
