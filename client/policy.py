"""The hospital's last word: a study is agreed to or refused, never quietly altered."""

from client.site import Site
from common.errors import RefusedError, complaint
from common.study import Study


def agree(site: Site, study: Study, training_patients: int) -> None:
    """Return if this site takes part in a study; raise `RefusedError` otherwise.

    Args:
      site: Whose policy decides.
      study: The request.
      training_patients: Patients that would train here; 0 at a site that only evaluates.
    """
    policy, where = site.policy, f"{site.source}: policy"
    if policy.require_privacy and study.privacy.mechanism == "none":
        expected = "a study with differential privacy (require_privacy)"
        raise RefusedError(complaint(where, expected=expected, got="privacy: none"))
    if policy.unfreeze is not None and study.model.unfreeze not in policy.unfreeze:
        expected = f"unfreeze to be one of {', '.join(policy.unfreeze)}"
        raise RefusedError(complaint(where, expected=expected, got=study.model.unfreeze))
    if site.role == "train" and training_patients < policy.min_patients:
        expected = f"at least {policy.min_patients} training patients (min_patients)"
        raise RefusedError(complaint(where, expected=expected, got=training_patients))
