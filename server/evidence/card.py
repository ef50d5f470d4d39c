"""The model's card: what a run knows of its model, as Markdown and as JSON, and nothing invented.

Its head is what model hubs read (huggingface/hub-docs, modelcard.md). What nobody stated is called
"not stated".
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from common.config.study import Private
from common.metrics.metrics import METRICS, value
from common.page.blocks import Block, Facts, Section, Table, Text
from server.evidence.facts import RunFacts
from server.runs.results import FEDERATED

_NOT_STATED = "not stated"


def write_card(facts: RunFacts, sections: list[Section]) -> str:
    """Write the card: a head for model hubs, then the same sections as the report, as Markdown.

    Args:
      facts: Of the run.
      sections: Of the report that need no picture.
    """
    head = yaml.safe_dump(_make_head(facts), sort_keys=False, allow_unicode=True)
    study = facts.study
    parts = [f"---\n{head}---\n", f"# {study.name}\n", *map(_write_section, sections)]
    return "\n".join(parts)


def describe_use(facts: RunFacts) -> Facts:
    """What people stated of the model, in the study's `card`, and what they did not."""
    card = facts.study.card
    return Facts(
        {
            "intended use": card.intended_use or _NOT_STATED,
            "source of labels": card.label_source or _NOT_STATED,
            "contact": card.contact or _NOT_STATED,
            "licence": card.license or _NOT_STATED,
        }
    )


def collect_card_facts(facts: RunFacts) -> str:
    """The same as JSON, for machines: what the study asked for, sites told, and a run found."""
    happened = facts.happened
    content = {
        "study": facts.study.model_dump(mode="json"),
        "card": {k: v or _NOT_STATED for k, v in facts.study.card.model_dump().items()},
        "began": happened.began and happened.began.isoformat(),
        "ended": happened.ended and happened.ended.isoformat(),
        "released_round": facts.told.get("released_round"),
        "contract": facts.facts.get("contract"),
        "fingerprint": facts.facts.get("fingerprint"),
        "weights": facts.facts.get("weights"),
        "versions": facts.facts.get("versions"),
        "sites": facts.sites,
        "refused": facts.facts.get("refused"),
        "left_out": [[*key, times] for key, times in sorted(happened.left_out.items())],
        "performance": _measure(facts),
        "epsilon_spent": facts.told.get("spent"),
    }
    return json.dumps(content, indent=1)


def _make_head(facts: RunFacts) -> dict[str, Any]:
    study = facts.study
    measured = _measure(facts)[FEDERATED]
    results = [
        {"type": name, "name": METRICS[name].label, "value": round(number, 4)}
        for name, number in measured.items()
        if number is not None
    ]
    tags = ["federated-learning", "medical-imaging", "consilium"]
    tags += ["differential-privacy"] if isinstance(study.privacy, Private) else []
    task = {"type": "image-classification"}
    data = {"type": study.name, "name": "test patients of all sites", "split": "test"}
    index = {"name": study.name, "results": [{"task": task, "dataset": data, "metrics": results}]}
    return {
        "license": study.card.license or _NOT_STATED,
        "library_name": "consilium",
        "pipeline_tag": "image-classification",
        "base_model": study.model.backbone,
        "tags": tags,
        "model-index": [index],
    }


def _measure(facts: RunFacts) -> Mapping[str, Mapping[str, float | None]]:
    whole = facts.united
    return {way: {m: value(counts, m) for m in METRICS} for way, counts in whole.items()}


def _write_section(section: Section) -> str:
    lines = [line for block in section.blocks for line in _write_block(block)]
    return "\n".join([f"## {section.title}\n", *lines])


def _write_block(block: Block) -> Iterator[str]:
    """A block as Markdown; pictures stand in the report alone."""
    if isinstance(block, Text):
        yield f"{_escape(block.text)}\n"
    elif isinstance(block, Facts):
        yield from (f"- **{_escape(k)}**: {_escape(v)}" for k, v in block.rows.items())
        yield ""
    elif isinstance(block, Table):
        yield from (f"{_escape(block.caption)}.\n",) if block.caption else ()
        yield _row(list(map(_escape, block.columns)))
        yield _row(["---"] * block.left + ["---:"] * (len(block.columns) - block.left))
        yield from (_row(list(map(_escape, row))) for row in block.rows)
        yield ""


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>|#&~$" else c for c in plain)
