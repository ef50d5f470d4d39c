"""The coordinator: it joins sites, runs the rounds and keeps the run folder.

The way in is `coordinator`, and `cli` for a person. Nothing here ever sees an image.
"""

import common  # noqa: F401 - its switches, before anything of ours imports flwr
