"""The one source of reproducible randomness. Privacy noise and private sampling never use it."""

import hashlib
import json


def derive(*parts: str | int) -> int:
    """A 63-bit seed from what it is for, such as `(study.seed, site, round, "batches")`.

    Different parts give independent seeds (SHA-256); equal parts give equal seeds on any machine.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
