"""What a hospital's own page says of what left: to the coordinator, of privacy, by which study."""

from collections.abc import Iterator

from client.ledger.entries import Contents
from client.ledger.spending import MEANING, UNACCOUNTED
from client.reports.outcome import SiteOutcome
from common.config.study import Private
from common.page.blocks import Block, Facts, Table, Text
from common.protocol.evidence import tells_evidence
from common.support.terminal import size

_STAYED = (
    "Not told: images, what is prepared from them, names and ids of patients, the model that was "
    "fitted to this hospital and the one of its patients alone, scores of single images, and this "
    "page."
)
_OUTSIDE = (
    "Outside of ε: what was told when this hospital joined; settings of the study that somebody "
    "chose by looking at the data; the pretraining of the backbone; the time that answers took."
)


def describe_told(outcome: SiteOutcome) -> Iterator[Block]:
    """What the coordinator was told, by agreement, and what he was not."""
    agreed = outcome.prepared.agreed or outcome.prepared.offer
    told = agreed.disclosure
    compared = tells_evidence(told, outcome.prepared.offer.patients.test)
    own = "counts on test patients" + (", and how they compare" if compared else "")
    sums = "none" if told.sums == "none" else f"of {told.sums} patients of a class or more"
    yield Facts(
        {
            "numbers": f"{told.counts}" + (f", multiples of {told.base}" if told.base > 1 else ""),
            "figures": str(told.metrics),
            "held-out patients": f"noise with ε {told.epsilon:g}" if told.epsilon else "no noise",
            "sums of features": sums,
            "the hospital's own models": own if told.adapted else "nothing",
            "withheld": told.withheld or "nothing of these",
        }
    )
    yield Text(_STAYED)


def list_messages(outcome: SiteOutcome) -> Table:
    """Every message of the study that left, line by line of the ledger."""
    rows = [
        [
            entry.time,
            f"round {entry.release.round}" if entry.release.round else entry.release.kind,
            size(entry.contents.bytes),
            entry.contents.sha256[:16],
            _list_figures(entry.contents),
        ]
        for entry in outcome.sent
    ]
    heads = ("time", "message", "size", "SHA-256", "tensors and figures")
    caption = "By this hospital's ledger; consilium-client disclosed shows the same"
    return Table(heads, rows, left=len(heads), caption=caption)


def _list_figures(contents: Contents) -> str:
    tensors = [f"{len(contents.tensors)} tensors"] if contents.tensors else []
    return ", ".join([*tensors, *contents.metrics]) or "nothing"


def describe_spending(outcome: SiteOutcome) -> Iterator[Block]:
    """What the study spent of the hospital's privacy budget, and what that means."""
    study, spending = outcome.prepared.study, outcome.spending
    if not isinstance(study.privacy, Private):
        yield Text(f"This study: {UNACCOUNTED}. No ε bounds what its tensors tell.", "bad")
    if any(one.private for one in spending.studies) or spending.ends:
        budget = outcome.prepared.site.policy.max_epsilon
        yield Facts(
            {
                "ε of this study": f"{spending.alone(study.id):.2f}",
                "ε of all studies here": f"{spending.total():.2f}",
                "δ": f"{spending.delta:g}",
                "budget": "none in site.yaml" if budget is None else f"max_epsilon {budget:g}",
                "accountant": spending.bound(),
                "unit": "one training patient, with every image, added or removed",
                "held-out patients": f"ε {spending.held_out():.2f}" if spending.ends else "no ε",
            }
        )
        yield Text(MEANING)
    yield Text(_OUTSIDE, "note")


def describe_study(outcome: SiteOutcome) -> Facts:
    """Which study it was, to the last byte, and who of this hospital took part."""
    prepared = outcome.prepared
    study, contract, patients = prepared.study, prepared.network.contract, prepared.offer.patients
    return Facts(
        {
            "study": f"{study.name} ({study.id})",
            "SHA-256 of the proposal": study.sha256,
            "classes": ", ".join(study.classes),
            "backbone": f"{study.model.backbone}, unfreeze: {study.model.unfreeze}",
            "role here": prepared.site.role,
            "patients": f"{patients.train} trained, {patients.validation} for validation, "
            f"{patients.test} for the test",
            "contract": contract.fingerprint,
            **{f"contract: {part}": text for part, text in contract.model_dump().items()},
        }
    )
