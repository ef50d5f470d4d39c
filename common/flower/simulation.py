"""Flower's own simulation engine.

| private name | why |
|---|---|
| `run_simulation` | the engine's only way in from a program, though Flower advises against it |
"""

from common.flower.compat import require_flwr

with require_flwr():
    from flwr.simulation import run_simulation

__all__ = ["run_simulation"]
