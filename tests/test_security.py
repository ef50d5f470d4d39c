"""Every test that SECURITY.md names as the attack on a claim is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"\[(tests/[\w/]+\.py)::(test_\w+)\]", (ROOT / "SECURITY.md").read_text("utf-8"))


def test_every_claim_names_a_test_that_is_there() -> None:
    assert len(NAMED) > 40
    missing = [
        f"{path}::{name}"
        for path, name in NAMED
        if not (ROOT / path).is_file()
        or not re.search(rf"^\s*def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []
