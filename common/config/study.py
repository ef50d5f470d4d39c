"""The study: what the coordinator asks for, as frozen models of `study.yaml`."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from common.config.yaml import Section, YamlFile, dump
from common.errors import StudyError


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return value


# Not strict: YAML reads 1e-3 as text.
Number = Annotated[float, BeforeValidator(_no_truth)]
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Names of studies and sites; they become folders and stand in logs."""
NAMED = "letters, digits, '.', '_' and '-', at most 64, a letter or digit first"


def _name(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise ValueError(f"expected {NAMED}, got {text!r}")
    return text


Name = Annotated[str, AfterValidator(_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
Moderate = Annotated[Number, Field(gt=0, le=1e4)]
"""Positive, and far from where float32 overflows."""


MOST_EPSILON, MOST_DELTA = 100.0, 1e-3
"""Beyond either, nobody is protected, and no study or site is taken to mean it."""


def _protects(epsilon: float) -> float:
    if epsilon > MOST_EPSILON:
        remedy = "So large an ε protects nobody: 8 or less is usual."
        raise ValueError(f"expected an ε of at most {MOST_EPSILON:g}, got {epsilon:g}. {remedy}")
    return epsilon


def _is_rare(delta: float) -> float:
    if delta > MOST_DELTA:
        remedy = "δ is the chance that nothing protects a patient: write 1.0e-5."
        raise ValueError(f"expected a δ of at most {MOST_DELTA:g}, got {delta:g}. {remedy}")
    return delta


Epsilon = Annotated[Positive, AfterValidator(_protects)]
Delta = Annotated[Number, Field(gt=0), AfterValidator(_is_rare)]


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"expected printable characters on one line, got {text!r}")
    return text


Word = Annotated[str, Field(max_length=100), AfterValidator(_one_line)]
FilePath = Annotated[str, Field(max_length=4096), AfterValidator(_one_line)]
Rounds = Annotated[StrictInt, Field(ge=1, le=100_000)]

Dtype = Literal["float32", "bfloat16"]
"""What a study may compute in."""


def _unfreeze(text: str) -> str:
    if not re.fullmatch(r"head|all|last:[1-9][0-9]{0,2}", text):
        raise ValueError(f"expected head, last:<k> or all, got {text!r}")
    return text


def _from_file(value: object, info: ValidationInfo) -> object:
    """The list that a JSON file holds, where the study itself comes from a file."""
    if not isinstance(value, str) or not info.context:
        return value
    path = Path(info.context["folder"]) / value
    try:
        return json.loads(path.read_text(encoding="utf-8"))["mean"]
    except OSError as ex:
        raise ValueError(f"expected a readable file, got {path}: {ex.strerror}") from None
    except (ValueError, KeyError, TypeError):
        expected = "expected what consilium-simulate feature-mean writes"
        raise ValueError(f"{expected}, got something else in {path}") from None


Mean = Annotated[tuple[Number, ...], Field(max_length=65_536), BeforeValidator(_from_file)]
"""Numbers; in a file beside the study, its name stands for what it holds."""

Unfreeze = Annotated[str, AfterValidator(_unfreeze)]


def _class_name(name: str) -> str:
    if not name.strip() or not name.isprintable() or len(name) > 100:
        raise ValueError(f"expected a class name of 1 to 100 printable characters, got {name!r}")
    return name


ClassName = Annotated[str, AfterValidator(_class_name)]


class Model(Section):
    """Which backbone, with which weights, and how much of it trains."""

    backbone: Word
    weights: FilePath = "DEFAULT"
    """`DEFAULT` (torchvision's own), `none` (random), or a file relative to the study."""
    unfreeze: Unfreeze = "head"
    dropout: Fraction = 0.0
    feature_mean: Mean | None = None
    """Subtracted from each image's features before the head: their mean on public images."""
    unit_features: bool = False
    """Scale each image's features, less that mean, to length 1."""
    precision: Dtype = "float32"
    """What frozen layers and, without privacy, trained ones compute in, at every site."""
    head: Literal["linear", "discriminant", "ridge"] = "linear"
    """`linear` is trained by rounds; the others are solved from sums over sites, in no round."""
    init: FilePath | None = None
    """`solved` begins with the discriminant head, solved from sums, `zero` with a head of zeros;
    else a run folder, whose released model is the starting point. Without it, `solved` where no
    privacy and no `unit_features: false` stand against it, else `zero`."""

    @property
    def solved_head(self) -> str | None:
        """The head that is solved before round 1, if one is."""
        if self.head != "linear":
            return self.head
        return "discriminant" if self.init == "solved" else None

    @property
    def init_run(self) -> Path | None:
        """The run folder to begin with, if there is one."""
        return None if self.init in (None, "solved", "zero") else Path(self.init)

    @property
    def weights_file(self) -> Path | None:
        """The local weights file, if the weights are one."""
        return None if self.weights in ("DEFAULT", "none") else Path(self.weights)


class Augment(Section):
    """Label-safe views of each training image; one of them is drawn each epoch."""

    views: Annotated[StrictInt, Field(ge=1, le=64)] = 1
    ops: Annotated[
        tuple[Literal["flip", "rotate", "crop", "brightness"], ...], Field(max_length=4)
    ] = ()

    @model_validator(mode="after")
    def _views_need_ops(self) -> Self:
        if (self.views > 1) != bool(self.ops):
            got = f"views: {self.views}, ops: [{', '.join(self.ops)}]"
            remedy = "Write augment: {} for none."
            raise ValueError(
                f"expected both views > 1 and some ops, or neither, got {got}. {remedy}"
            )
        return self


class Images(Section):
    """How an image becomes the backbone's input."""

    size: Annotated[StrictInt, Field(ge=32, le=1024)] | None = None
    """Side in pixels; without it, the backbone's own resize and crop."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _fits_a_disk(self) -> Self:
        if self.augment.views * (self.size or 0) ** 2 > 64 * 512**2:
            got = f"{self.augment.views} of {self.size}"
            raise ValueError(f"expected at most 64 views of side 512, or 16 of 1024, got {got}")
        return self


class Train(Section):
    """Local training at each site, each round, from a fresh optimizer."""

    rounds: Annotated[StrictInt, Field(ge=0, le=100_000)]
    """0 only where the head is solved."""
    local_epochs: Annotated[StrictInt, Field(ge=1, le=1000)] | None = None
    local_steps: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    batch_size: Annotated[StrictInt, Field(ge=1, le=65_536)] = 32
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Moderate = 1e-3
    momentum: Fraction = 0.9
    weight_decay: Annotated[Number, Field(ge=0, le=1e4)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    imbalance: Literal["none", "weighted", "focal"] = "none"
    class_weights: Annotated[tuple[Moderate, ...], Field(max_length=1000)] | None = None
    patience: Rounds | None = None
    """Stop after this many rounds without a better `select` metric; 5 after a solved head."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_epochs and self.local_steps:
            raise ValueError("expected local_epochs or local_steps, got both. Remove one.")
        if self.class_weights and self.imbalance == "weighted":
            raise ValueError(
                "expected class_weights or imbalance: weighted, got both. "
                "class_weights are constants, weighted computes them from each site's counts."
            )
        return self


class Holdout(Section):
    """Shares of each site's patients kept out of training (ignored where the data has a split)."""

    validation: Fraction = 0.15
    test: Fraction = 0.2

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.validation + self.test >= 1:
            held = self.validation + self.test
            remedy = "Lower one, so that some patients train."
            raise ValueError(f"expected validation + test < 1, got {held:g}. {remedy}")
        return self


class Aggregate(Section):
    """How the replies of a round become the next model."""

    strategy: Word = "fedavg"
    options: Annotated[dict[Word, Number], Field(max_length=100)] = {}
    """The strategy's own parameters, such as `proximal_mu`."""
    fraction: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the training sites asked in each round."""
    quorum: Annotated[StrictInt, Field(ge=1, le=100_000)] = 1
    """Fewest good replies that make a round count."""
    max_weight: Annotated[Number, Field(ge=1, le=1e6)] | None = 3.0
    """The largest weight of a site in the average, in medians of what the sites tell; or `null`."""
    round_timeout: Positive = 3600.0
    """Seconds to wait for a round's replies."""


class NoPrivacy(Section):
    """Nothing bounds what trained tensors tell about training patients."""

    mechanism: Literal["none"] = "none"


class Private(Section):
    """What every private mechanism promises: a bound on what a whole study tells about one."""

    epsilon: Epsilon
    """Over all queries that are planned, and the spare rounds."""
    delta: Delta


class DpSgd(Private):
    """DP-SGD by patient (Abadi et al. 2016), for layers that are trained by rounds."""

    mechanism: Literal["dp_sgd"]
    clip_norm: Annotated[Number, Field(ge=1e-3, le=1e3)] = 1.0
    """Largest L2 norm of one patient's gradient; far smaller ones vanish in float32, unclipped."""
    spare_rounds: Annotated[StrictInt, Field(ge=0, le=100_000)] = 2
    """Rounds that may be repeated, beyond `train.rounds`, within epsilon."""


class Gaussian(Private):
    """Two noised sums over all patients, from which a discriminant is solved in few directions."""

    mechanism: Literal["gaussian"]
    preset: Literal["head"] | None = None
    """Fills in mechanism, head and rounds of a private head."""
    directions: Annotated[StrictInt, Field(ge=2, le=512)] = 48
    """In which features are summed: fewer where patients are few, or ε is small."""


def _readable(text: str) -> str:
    if not text.strip() or not text.replace("\n", "").isprintable():
        raise ValueError(f"expected printable text, got {text!r}")
    return text.strip()


Prose = Annotated[str, Field(max_length=4000), AfterValidator(_readable)]


class Card(Section):
    """What people should know of the model, and a run cannot: for its card and its report."""

    intended_use: Prose | None = None
    """What the model is for, by whom, on whom; and what it is not for."""
    label_source: Prose | None = None
    """Who or what said which class an image is of, such as biopsies, or a reader's opinion."""
    contact: Prose | None = None
    license: Prose | None = None


Privacy = Annotated[NoPrivacy | DpSgd | Gaussian, Field(discriminator="mechanism")]
"""Which mechanism protects training patients."""

# Chosen by measurement on real data, on holdouts that no reported figure uses.
_PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "head": {"privacy": {"mechanism": "gaussian"}, "model": {"head": "discriminant"}}
}


def _own(given: object, section: str) -> dict[str, Any]:
    """What a study itself says in a section; nothing where it says no mapping."""
    own = given.get(section) if isinstance(given, dict) else None
    return own if isinstance(own, dict) else {}


def _preset(given: dict[str, Any]) -> dict[str, Any]:
    """What the preset of `privacy` says, and the study does not."""
    name = _own(given, "privacy").get("preset")
    if name is None:
        return given
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(f"expected privacy.preset: {' or '.join(_PRESETS)}, got {name}.")
    preset = _PRESETS[name]
    for section, values in preset.items():
        for key, wanted in values.items():
            if (got := _own(given, section).get(key, wanted)) != wanted:
                raise ValueError(
                    f"expected {section}.{key}: {wanted} with preset: {name}, got {got}. Remove "
                    "one of the two: the preset solves a head, and trains nothing by rounds."
                )
    return given | {section: values | _own(given, section) for section, values in preset.items()}


def _start(given: dict[str, Any]) -> dict[str, Any]:
    """How it starts: from a solved head, which reads features of length 1."""
    model, train = _own(given, "model"), _own(given, "train")
    if not model:
        return given
    if model.get("head", "linear") != "linear":
        return given | {"model": {"unit_features": True} | model, "train": {"rounds": 0} | train}
    private = _own(given, "privacy").get("mechanism", "none") != "none"
    usual = "zero" if private or model.get("unit_features") is False else "solved"
    if model.get("init", usual) != "solved":
        return given | {"model": {"init": usual} | model}
    filled = given | {"model": {"init": "solved", "unit_features": True} | model}
    return filled | {"train": {"patience": 5} | train} if train else filled


class Study(YamlFile):
    """One federated study; the coordinator's request, which a site may refuse."""

    name: Name
    classes: Annotated[tuple[ClassName, ...], Field(min_length=2, max_length=1000)]
    model: Model
    images: Images = Images()
    train: Train
    holdout: Holdout = Holdout()
    select: Literal["accuracy", "balanced_accuracy", "f1", "auroc", "loss"] = "balanced_accuracy"
    aggregate: Aggregate = Aggregate()
    privacy: Privacy = NoPrivacy()
    adapt: StrictBool = True
    """At the end, each site fits the released model to itself; the result stays there."""
    card: Card = Card()
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Fill in what a preset says, and how a study starts, where it does not say so itself."""
        return _start(_preset(given)) if isinstance(given, dict) else given

    @field_validator("classes", mode="after")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) != len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"expected distinct class names, got {twice!r} twice. Remove one.")
        return classes

    @model_validator(mode="after")
    def _weights_fit_classes(self) -> Self:
        weights = self.train.class_weights
        if weights and len(weights) != len(self.classes):
            raise ValueError(
                f"expected train.class_weights with one number per class ({len(self.classes)}), "
                f"got {len(weights)}"
            )
        return self

    @model_validator(mode="after")
    def _heads_and_rounds(self) -> Self:
        model, rounds = self.model, self.train.rounds
        if (model.head == "linear") != (rounds > 0):
            expected = "1 or more" if model.head == "linear" else "0"
            head = f"model.head: {model.head}" + " (as preset: head says)" * bool(self.directions)
            remedy = "Remove train.rounds." if rounds else "Set train.rounds."
            raise ValueError(
                f"expected train.rounds: {expected} with {head}, got {rounds}. {remedy}"
            )
        if model.solved_head is None:
            if self.directions:
                raise ValueError(
                    "expected model.head: discriminant with privacy.mechanism: gaussian, got "
                    "linear. Write preset: head, or, to train by rounds, mechanism: dp_sgd."
                )
            return self
        if self.private and (self.directions is None or model.head != "discriminant"):
            raise ValueError(
                "expected preset: head with privacy, for a discriminant solved from noised sums, "
                "or a head trained by rounds (head: linear, init: zero), got a head solved from "
                "sums of patients' features"
            )
        if not model.unit_features:
            raise ValueError(
                "expected model.unit_features: true with a solved head, got false. "
                "To train a head from zero on features as they are, write init: zero."
            )
        if model.head != "linear" and (model.unfreeze != "head" or model.init):
            raise ValueError(
                f"expected unfreeze: head and no init beside model.head: {model.head}, got "
                f"unfreeze: {model.unfreeze}, init: {model.init}. "
                "To train on from a solved head, write head: linear and init: solved."
            )
        return self

    @model_validator(mode="after")
    def _nothing_beside_the_mechanism(self) -> Self:
        if not self.private:
            return self
        if self.train.imbalance == "weighted":
            raise ValueError(
                "expected train.imbalance: none or focal with privacy, got weighted. Its weights "
                "come from patients; set train.class_weights to constants instead."
            )
        if self.train.patience:
            raise ValueError(
                f"expected no train.patience with privacy, got {self.train.patience}. "
                "No round is scored; the last model is released."
            )
        return self

    @property
    def private(self) -> bool:
        """Whether a mechanism protects training patients."""
        return self.privacy.mechanism != "none"

    @property
    def directions(self) -> int | None:
        """In how many directions a private head reads features, if it is solved."""
        return self.privacy.directions if isinstance(self.privacy, Gaussian) else None

    @property
    def finds_centre(self) -> bool:
        """Whether the sites' own mean may be the centre of their features."""
        return self.model.unit_features and self.model.feature_mean is None and not self.private

    @classmethod
    def read(cls, path: Path, changes: tuple[str, ...] = ()) -> Self:
        """The study in `path`, its own relative paths made absolute.

        Raises:
          StudyError: naming file, key, what was expected, and the nearest valid name.
        """
        study = cls.load(path, StudyError, changes)
        update: dict[str, Any] = {}
        if study.model.weights_file:
            update["weights"] = str((path.parent / study.model.weights).resolve())
        if study.model.init_run:
            update["init"] = str(study.model.init_run.resolve())
        resolved = study.model_copy(update={"model": study.model.model_copy(update=update)})
        resolved._source = study.source
        return resolved

    def error(self, key: str, *, expected: str, got: object, remedy: str = "") -> StudyError:
        """A `StudyError` about one key of this study, naming its file."""
        where = f"{self.source}: {key}"
        return StudyError(where, expected=expected, got=got, remedy=remedy)

    def yaml(self) -> str:
        """This study as YAML text."""
        return dump(self.model_dump(mode="json"))

    def proposal(self) -> str:
        """What sites are shown: canonical JSON without this machine's paths."""
        weights = self.model.weights_file.name if self.model.weights_file else self.model.weights
        init = "zero" if self.model.init_run else self.model.init
        model = self.model.model_copy(update={"weights": weights, "init": init})
        return self.model_copy(update={"model": model}).model_dump_json()

    @property
    def sha256(self) -> str:
        """Of this exact proposal."""
        return hashlib.sha256(self.proposal().encode()).hexdigest()

    @property
    def id(self) -> str:
        """16 hex digits of that; whoever computes for long finds another study with the same."""
        return self.sha256[:16]
