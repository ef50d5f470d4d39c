"""A released model taken home: a folder that other software reads, and `load_model`, too."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common.config.study import Private, Study
from common.errors import RunError
from common.model.description import DESCRIPTION, STUDY, WEIGHTS
from common.model.inference import load_model
from common.model.onnx_file import list_missing, write_onnx
from common.support import files

ONNX = "model.onnx"
_CARDS = ("card.md", "facts.json")
"""What a run folder may have for people, and goes with its model."""
_RUN = ("fingerprint", "contract", "weights", "versions")
NOT_PRIVATE = "Trained without differential privacy: it may hold traces of single patients."


def export_model(folder: Path, out: Path) -> dict[str, Any]:
    """Write the model of `folder` into `out`; returns the facts that its description tells.

    These are `model.safetensors` (its tensors by PyTorch's names), `model.json` (all that its use
    needs beside them) and, with the extra `export`, `model.onnx`; the card of a run, if it has one.

    Args:
      folder: As `load_model` takes it.
      out: A new or empty folder.

    Raises:
      RunError: there is no model, `out` has files, or the ONNX file is not as it should be.
    """
    model = load_model(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(out, expected="a new or empty folder", got="one with files, or a file")
    weights = (folder / WEIGHTS).read_bytes()
    facts = dict(model.about.facts) | dict(_list_facts(folder))
    sha256 = hashlib.sha256(weights).hexdigest()
    about = model.about.model_copy(update={"sha256": sha256, "facts": facts})
    out.mkdir(parents=True, exist_ok=True)
    for name in _CARDS:
        if (folder / name).is_file():
            files.write(out / name, (folder / name).read_bytes())
    if not list_missing():
        write_onnx(replace(model, about=about), out / ONNX)
    files.write(out / WEIGHTS, weights)
    files.write(out / DESCRIPTION, about.to_json())
    return facts


def _list_facts(folder: Path) -> Iterator[tuple[str, Any]]:
    """What a run, or a site, wrote beside the model: privacy, contract, results; no site's name."""
    if (folder / STUDY).is_file():
        yield "privacy", _tell_privacy(Study.read(folder / STUDY), folder / "about.json")
    if (folder / "run.yaml").is_file():
        run = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
        yield from ((key, run[key]) for key in _RUN if key in run)
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text("utf-8"))
        yield "released_round", report["released_round"]
        results = {way: dict(each["overall"]) for way, each in report["results"].items()}
        for figures in results.values():
            figures.pop("left_out", None)  # names of sites
        yield "results", results


def _tell_privacy(study: Study, own: Path) -> dict[str, Any]:
    """Of the released model, or, where a site wrote `own` beside it, of the site's own."""
    if own.is_file():
        return {"private": False, "note": json.loads(own.read_text("utf-8"))["note"]}
    if not isinstance(study.privacy, Private):
        return {"private": False, "note": NOT_PRIVATE}
    told = study.privacy.model_dump(mode="json", include={"mechanism", "epsilon", "delta"})
    return {"private": True, "unit": "training patient", **told}
