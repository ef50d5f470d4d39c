"""The shares that a site holds out: the same in all of its private studies."""

from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import Holdout, Study
from common.errors import RefusedError, SiteError
from common.support import files


def read_holdout(site: Site) -> Holdout | None:
    """The shares that the private studies of this site hold out; None before a private draw.

    Raises:
      SiteError: the file cannot be read, or is damaged.
    """
    path = site.state / "holdout.json"
    with explain_disk_errors(path, SiteError):
        text = path.read_bytes() if path.is_file() else None
    try:
        return None if text is None else Holdout.model_validate_json(text)
    except ValueError:
        expected, remedy = "shares as written", "Restore it from a backup."
        raise SiteError(path, expected=expected, got="something else", remedy=remedy) from None


def check_holdout(site: Site, study: Study) -> None:
    """Return if a private study holds out the shares that every private one here does.

    With other shares, those told of validation and test would add up to who trains; and who trains
    in one would be a test patient of another, whom no noise protects.

    Raises:
      RefusedError: an earlier one held out others.
    """
    kept = read_holdout(site)
    if kept is not None and study.private and kept != study.holdout:
        where, got = f"study {study.name}: holdout", study.holdout.model_dump_json()
        expected = f"that of the private studies before, {kept.model_dump_json()}"
        remedy = "Ask the coordinator for those shares."
        raise RefusedError(where, expected=expected, got=got, remedy=remedy)


def keep_holdout(site: Site, study: Study) -> None:
    """From its first private draw on, a site holds out the same patients in all private studies.

    Not from its first agreement on: whoever proposes a study would fix them for all others.
    """
    path = site.private() / "holdout.json"
    with explain_disk_errors(path, SiteError):
        if study.private and not path.exists():
            files.write(path, study.holdout.model_dump_json(), mode=0o600)
