"""One hospital: its data, its policy, its training.

The way in is `app`, for a server, and `cli`, for a person. Nothing here listens on a port.
"""

# First of all: an unfit flwr is refused in fixed words before anything else imports it.
import common.flower.messages  # noqa: F401
