"""The course of a run: who took part, what failed, what it cost, and what it was made of."""

from collections.abc import Iterator

from common.page.blocks import Block, Facts, Table, Text
from common.support.terminal import size
from server.evidence.facts import RunFacts


def describe_course(facts: RunFacts) -> Iterator[Block]:
    """Say who took part and when, and what failed."""
    if not facts.sites:
        return
    happened, study = facts.happened, facts.study
    rounds = max((line["round"] for line in facts.history if line["bytes"]), default=0)
    yield Facts(
        {
            "began": _time(happened.began),
            "ended": _time(happened.ended),
            "interrupted": f"{max(happened.starts - 1, 0)} times",
            "rounds": f"{rounds} of at most {study.train.rounds}; released: {facts.released}",
            "time in rounds": f"{happened.seconds:.0f} s",
        }
    )
    yield Table(
        ("site", "role", "training patients", "weight", "rounds", "bytes sent", "left out"),
        [_row(facts, name) for name in facts.sites],
        left=2,
        caption="Participation; bytes are of trained tensors in rounds, as many came to each site; "
        "what a head was solved from comes on top",
    )
    for name, why in facts.facts.get("refused", {}).items():
        yield Text(f"{name} took no part: {why}.")
    for (name, why), times in sorted(happened.left_out.items()):
        yield Text(f"{name} was left out of {times} exchanges: {why}.", "note")


def describe_making(facts: RunFacts) -> Iterator[Block]:
    """Say what the model was made of and with which software, so that it can be made again."""
    if not facts.sites:
        return
    study, said = facts.study, facts.facts
    weights = said.get("weights", {})
    versions = said.get("versions", {})
    yield Facts(
        {
            "study": f"{study.name} ({study.id})",
            "classes": ", ".join(study.classes),
            "backbone": study.model.backbone,
            "pretrained weights": f"{weights.get('name', study.model.weights)}, SHA-256 "
            f"{weights.get('sha256', 'not stated')}",
            "trained": f"unfreeze: {study.model.unfreeze}; head: {study.model.head}; strategy: "
            f"{study.aggregate.strategy}",
            "contract": str(said.get("fingerprint", "not stated")),
            **{f"contract: {key}": str(text) for key, text in said.get("contract", {}).items()},
            "seed": str(study.seed),
            "software": ", ".join(f"{name} {number}" for name, number in versions.items()),
        }
    )


def _row(facts: RunFacts, name: str) -> list[str]:
    site = facts.sites[name]
    lines = [line for line in facts.history if line["site"] == name and line["bytes"]]
    weight = facts.told.get("site_weights", {}).get(name)
    patients = site["patients"]["train"]
    out = sum(n for (left, _), n in facts.happened.left_out.items() if left == name)
    return [
        name,
        site["role"],
        "not told" if patients is None else str(patients),
        f"{weight['share']:.1%}" if weight else "none",
        str(len(lines)),
        size(sum(line["bytes"] for line in lines)),
        f"{out} times" if out else "never",
    ]


def _time(moment: object) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "not recorded"
