"""The installed environment as a CycloneDX software bill of materials, in JSON on standard output.

CycloneDX 1.5: https://cyclonedx.org/docs/1.5/json.
"""

import json
import sys
from importlib.metadata import Distribution, distributions
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PRODUCT = "consilium"


def find_installed() -> dict[str, Distribution]:
    """What is installed, by its canonical name; the first on the path counts, as in an import."""
    found: dict[str, Distribution] = {}
    for one in distributions():
        found.setdefault(canonicalize_name(one.name), one)
    return dict(sorted(found.items()))


def write_bill() -> dict[str, Any]:
    """The bill of materials of this environment."""
    installed = find_installed()
    product = installed.get(PRODUCT)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": PRODUCT,
                "name": PRODUCT,
                "version": product.version if product else "",
            }
        },
        "components": [_describe(name, one) for name, one in installed.items() if name != PRODUCT],
        "dependencies": [
            {"ref": _refer(name, one), "dependsOn": _list_needs(one, installed)}
            for name, one in installed.items()
        ],
    }


def _refer(name: str, one: Distribution) -> str:
    return PRODUCT if name == PRODUCT else f"pkg:pypi/{name}@{one.version}"


def _describe(name: str, one: Distribution) -> dict[str, Any]:
    purl = _refer(name, one)
    about = {"type": "library", "bom-ref": purl, "name": name, "version": one.version, "purl": purl}
    meta = one.metadata
    if "License-Expression" in meta:
        return {**about, "licenses": [{"expression": meta["License-Expression"]}]}
    told = [line for line in meta.get_all("Classifier", []) if line.startswith("License ::")]
    names = [line.rpartition(" :: ")[2] for line in told]
    return {**about, "licenses": [{"license": {"name": each}} for each in names]}


def _list_needs(one: Distribution, installed: dict[str, Distribution]) -> list[str]:
    """What it requires here, without its extras."""
    needs = [Requirement(line) for line in one.requires or ()]
    here = [n for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    names = sorted({canonicalize_name(need.name) for need in here} & installed.keys())
    return [_refer(name, installed[name]) for name in names]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(write_bill(), indent=1) + "\n")
