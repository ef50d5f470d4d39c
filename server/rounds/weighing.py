"""The weights of sites in the average, bounded: no site owns it by what it says of itself."""

from collections.abc import Mapping, Sequence
from math import inf
from statistics import median_low

from server.rounds.admission import Member
from server.runs.results import Weight


def weigh_sites(members: Sequence[Member], most: float | None) -> dict[str, Weight]:
    """Weigh the sites that train, by their names.

    A site weighs as many images as it trains on, if all tell that exactly and without privacy: told
    by some, or coarsely, they are no fair weight, and all weigh the same. With privacy it is the
    number of patients that each declares.

    Args:
      members: The sites that train.
      most: The largest weight allowed, in medians of what all tell; no limit if it is None. Of an
        even number of sites the median is the lower of the middle two: of two, the smaller bounds
        the larger.
    """
    told = _read_told(members)
    limit = inf if most is None or not told else most * median_low(told.values())
    numbers = {m.name: min(float(told[m.name]), limit) if told else 1.0 for m in members}
    total = sum(numbers.values())
    return {name: Weight(told.get(name), n, n / total) for name, n in numbers.items()}


def _read_told(members: Sequence[Member]) -> Mapping[str, int]:
    """What each site tells that may weigh it; nothing unless all of them do."""
    declared = {m.name: m.reply.enrolled or 0 for m in members}
    exact = {m.name: m.reply.images.train or () for m in members if m.reply.disclosure.base == 1}
    counted = {name: sum(images) for name, images in exact.items()}
    both = (declared, counted)
    return next((t for t in both if len(t) == len(members) and all(t.values())), {})
