"""What a released model is, beside its weights: how to build it, and to read images and answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from common.config.study import ClassName, Name, Sha256, Study, Word
from common.config.yaml import Section, YamlFile
from common.errors import RunError
from common.heads.read_out import AS_IT_IS, ReadOut
from common.model import backbones
from common.model.images import Preprocess

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
STUDY = "study.yaml"


class HeadLayers(Section):
    """Which layers a head has before the linear one; as in `backbones.Head`."""

    centre: bool
    unit: bool
    directions: Annotated[StrictInt, Field(ge=2, le=512)] | None


class Description(YamlFile):
    """A released model without its weights, as `model.json` of an exported one holds it."""

    format: Literal["consilium model 1"] = "consilium model 1"
    study: Name
    study_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    classes: Annotated[tuple[ClassName, ...], Field(min_length=2, max_length=1000)]
    """The names of its outputs, in their order."""
    backbone: Word
    head: HeadLayers
    preprocess: Preprocess
    """From an image file to the network's input, [n, 3, crop, crop] less the mean, by the std."""
    read_out: ReadOut = AS_IT_IS
    """Probabilities are softmax(logits / temperature + log_prior)."""
    decision: str = "the class with the highest logit, which need not be the most probable one"
    sha256: Sha256 | None = None
    """Of the file of weights, where it is known."""
    facts: Mapping[str, Any] = {}
    """For people: privacy, results, and the like."""

    def to_json(self) -> str:
        """As `read_description` reads it."""
        content = self.model_dump(mode="json", exclude={"preprocess": {"version"}})
        return json.dumps(content, indent=1, ensure_ascii=False)


def read_description(folder: Path) -> Description:
    """What the model in a run's folder is, or in one in a site's state/adapted, or exported.

    Raises:
      RunError: there is no such folder, it holds none or several, the run is not finished, or a
        file is damaged.
    """
    if not (folder / WEIGHTS).is_file():
        raise _explain_absence(folder)
    if (folder / DESCRIPTION).is_file():
        about = _read_exported(folder / DESCRIPTION)
    elif (folder / STUDY).is_file():
        about = _describe_run(Study.read(folder / STUDY), _read_out(folder))
    else:
        raise _explain_absence(folder)
    if not about.read_out.good(len(about.classes)):
        raise RunError(folder, expected="a read-out of the model's classes", got="another")
    return about


def _describe_run(study: Study, read_out: ReadOut) -> Description:
    model, backbone = study.model, backbones.get(study.model.backbone)
    return Description(
        study=study.name,
        study_id=study.id,
        classes=study.classes,
        backbone=model.backbone,
        head=HeadLayers(
            centre=study.finds_centre or model.feature_mean is not None,
            unit=model.unit_features,
            directions=study.directions,
        ),
        preprocess=backbone.preprocess(model.weights).with_size(study.images.size),
        read_out=read_out,
    )


def _read_exported(path: Path) -> Description:
    try:
        return Description.parse(json.loads(path.read_text("utf-8")), str(path), RunError)
    except (OSError, ValueError, RecursionError):
        raise RunError(path, expected="a model's description", got="a damaged one") from None


def _explain_absence(folder: Path) -> RunError:
    """What a folder is that holds no released model, and what to do."""
    got, remedy = _name_absence(folder)
    return RunError(folder, expected="the folder of a finished run", got=got, remedy=remedy)


def _name_absence(folder: Path) -> tuple[str, str]:
    name = "Name a run folder, or one in a site's state/adapted."
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder", name
    if (folder / STUDY).is_file():
        resume = f"run --resume {folder}"
        remedy = f"Finish it with consilium-simulate {resume}, in a deployment consilium-server's."
        return "a run that is not finished", remedy
    # Of several seeds, of a sweep's settings and seeds, of a site's state.
    found = sorted([*folder.glob("*/model.safetensors"), *folder.glob("*/*/model.safetensors")])
    if found:
        return f"a folder that holds {len(found)}", f"Name one itself, such as {found[0].parent}."
    return "a folder without one", name


def _read_out(folder: Path) -> ReadOut:
    path = folder / "read_out.json"
    try:
        told = json.loads(path.read_text("utf-8"))
        return ReadOut(float(told["temperature"]), tuple(map(float, told["log_prior"])))
    except FileNotFoundError:
        return AS_IT_IS
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise RunError(path, expected="the model's read-out", got="a damaged one") from None
