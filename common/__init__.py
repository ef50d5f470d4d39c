"""What server, hospital and simulator must agree on.

Each room is a way in. Nothing here knows a role.
"""

import os

# Read by flwr when it is imported, by whatever module of ours: no telemetry, no update check, no
# package installation.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
