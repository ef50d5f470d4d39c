"""The privacy statement of a run: one row for each site, never a mean or a sum."""

from collections.abc import Iterator

from common.config.study import DpSgd, Gaussian, NoPrivacy, Private
from common.metrics.guarantee import bound_belief, bound_gaussian_power, bound_power
from common.page.blocks import Block, Facts, Table, Text
from server.evidence.facts import RunFacts

_FEW = 0.01
"""The share of others that a test may take for patients who took part."""
_NONE = (
    "No differential privacy: nothing bounds what the trained tensors, or the sums, tell of single "
    "training patients to the coordinator, to other sites, and to whoever has the model."
)
_SUMS = (
    "Sites sent sums of features. A sum over one patient is that patient's features, so each site "
    "set the fewest patients of a class for which it sends sums."
)
_OUTSIDE = (
    "Outside of ε: validation and test patients, but where a site has an ε of their own; what "
    "sites told when they joined; settings of the study that were chosen by looking at the data; "
    "the pretraining of the backbone; the time that answers took."
)
_MECHANISMS = {
    "dp_sgd": "DP-SGD by patient: of each step, clipped gradients of drawn patients, with noise",
    "gaussian": "two sums of one clipped row of each patient, with noise",
}


def describe_privacy(facts: RunFacts) -> Iterator[Block]:
    """Say what was promised to training patients, to whom, and what that means."""
    privacy = facts.study.privacy
    if isinstance(privacy, NoPrivacy):
        yield Text(_NONE, "bad")
        if facts.solved:
            yield Text(_SUMS)
    else:
        yield from _describe_promise(facts, privacy)
    if not facts.sites:
        return
    yield Table(
        ("site", "training patients", "validation and test patients", "withheld"),
        [_row(facts, name) for name in facts.sites],
        left=4,
        caption="What protects whom, by site",
    )


def explain_promise(epsilon: float, delta: float, *, gaussian: bool) -> str:
    """Say what ε means for one patient, in odds and by how well a test could do."""
    belief = bound_belief(epsilon)
    any_power = bound_power(epsilon, delta, _FEW)
    told = (
        f"Who thought it as likely as not that a patient took part can become at most {belief:.2%} "
        f"sure by all that left (but for a chance of δ). A test that wrongly accuses {_FEW:.0%} of "
        f"others finds at most {any_power:.2%} of those who took part"
    )
    if not gaussian:
        return f"{told}."
    power = bound_gaussian_power(epsilon, delta, _FEW)
    return f"{told}; as the noise is Gaussian, at most {power:.2%}."


def _describe_promise(facts: RunFacts, privacy: DpSgd | Gaussian) -> Iterator[Block]:
    gaussian = privacy.mechanism == "gaussian"
    yield Text(explain_promise(privacy.epsilon, privacy.delta, gaussian=gaussian))
    yield Facts(
        {
            "promise": f"(ε, δ) = ({privacy.epsilon:g}, {privacy.delta:g}) for the whole study, "
            "at each site",
            "unit": "one training patient, with all images and views",
            "adjacency": "that patient added or removed",
            "setting": "noise is added at the hospital, before anything leaves",
            "mechanism": _MECHANISMS[privacy.mechanism],
            "accountant": "PRV within the study, enforced by each site's ledger before each "
            "answer; Rényi over all studies of a site",
            "randomness": "the operating system's entropy; noise on an integer lattice, so that "
            "floating point tells nothing",
            "holds against": "the coordinator, other sites, and whoever has the model",
            **_audited(facts),
        }
    )
    yield Text(_OUTSIDE, "note")


def _audited(facts: RunFacts) -> dict[str, str]:
    if facts.audit is None:
        return {"audit": "none beside this report; see consilium-simulate audit"}
    return {"audit": f"attacks on the same study show that ε is at least {facts.audit:.2f}"}


def _row(facts: RunFacts, name: str) -> list[str]:
    site, privacy = facts.sites[name], facts.study.privacy
    spent = facts.told.get("spent", {}).get(name)
    train = "trained without privacy"
    if site["role"] != "train":
        train = "none train here"
    elif isinstance(privacy, Private):
        train = f"ε {privacy.epsilon:g} promised" + (f", {spent:.2f} spent" if spent else "")
    own = site["disclosure"]["epsilon"]
    base = f"numbers told: {site['disclosure']['counts']}"
    held = f"ε {own:g}, by noise in their counts" if own else base
    return [name, train, held, facts.withheld(name)]
