"""The bill of materials is whole; the audit finds, and says when it cannot look."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.builders import ROOT
from tools.audit import BLIND, NONE, SOME, audit
from tools.sbom import find_installed, write_bill


def test_every_package_is_in_the_bill_once_and_what_it_needs_too() -> None:
    bill = write_bill()
    names = [part["name"] for part in bill["components"]]
    assert len(names) == len(set(names))
    assert {"torch", "flwr", "numpy"} <= set(names)
    assert set(names) | {"consilium"} == set(find_installed()) | {"consilium"}
    refs = {part["bom-ref"] for part in bill["components"]} | {"consilium"}
    for line in bill["dependencies"]:
        assert line["ref"] in refs
        assert refs.issuperset(line["dependsOn"])
    assert f"pkg:pypi/torch@{version('torch')}" in refs


def test_every_version_in_the_constraints_has_a_hash_and_no_index_is_named() -> None:
    for name in (
        "constraints.txt",
        "constraints-ray.txt",
        "constraints-export.txt",
        "constraints-mlflow.txt",
    ):
        text = (ROOT / name).read_text("ascii")
        lines = [line for line in text.split("\n") if line and not line.startswith("#")]
        pinned = [line for line in lines if not line.startswith(" ")]
        assert all("==" in line and line.endswith(" \\") for line in pinned)
        after = [lines[lines.index(line) + 1] for line in pinned]
        assert all(line.startswith("    --hash=sha256:") for line in after)
        assert "://" not in text
        names = {Requirement(line.removesuffix(" \\")).name for line in pinned}
        assert {"torch", "flwr", "setuptools"} <= names


def advisory(folder: Path, **affected: Any) -> None:
    package = {"ecosystem": "PyPI", "name": "NumPy"}
    content = {"id": "PYSEC-1", "affected": [{"package": package, **affected}]}
    (folder / "PYSEC-1.json").write_text(json.dumps(content))


def between(*events: dict[str, str]) -> dict[str, Any]:
    return {"ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}


HERE = version("numpy")


@pytest.mark.parametrize(
    ("affected", "code"),
    [
        ({"versions": [HERE]}, SOME),
        ({"versions": ["0.1"]}, NONE),
        (between({"introduced": "0"}), SOME),
        (between({"introduced": "0"}, {"fixed": "1.0"}), NONE),
        (between({"introduced": "0"}, {"fixed": HERE}), NONE),
        (between({"introduced": "0"}, {"last_affected": HERE}), SOME),
        (between({"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.5"}), SOME),
        (between({"introduced": "99"}), NONE),
    ],
)
def test_an_affected_version_is_found(affected: dict[str, Any], code: int, tmp_path: Path) -> None:
    advisory(tmp_path, **affected)
    found, lines = audit(tmp_path)
    assert found == code
    assert (f"numpy {HERE}: PYSEC-1" in lines) == (code == SOME)


def test_an_audit_that_cannot_look_never_says_that_all_is_well(tmp_path: Path) -> None:
    for folder in (None, tmp_path, tmp_path / "gone"):
        code, (line,) = audit(folder)
        assert code == BLIND
        assert line.startswith("could not look: no ")
    (tmp_path / "odd.json").write_text("[]")
    assert audit(tmp_path)[0] == BLIND
