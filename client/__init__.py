"""One hospital: its data, its policy, its training."""

# First of all: an unfit flwr is refused in fixed words before anything else imports it.
import common.flower.messages  # noqa: F401
