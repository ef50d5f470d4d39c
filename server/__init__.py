"""The coordinator: joins sites, runs the rounds, keeps the run folder."""

import common  # noqa: F401 - its switches, before anything of ours imports flwr
