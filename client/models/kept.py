"""Which of its models a site keeps for its own use, by the name of a study."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from client.site import Site
from common.config.study import Study
from common.errors import ConsiliumError, SiteError


def name_folder(site: Site, study: Study) -> Path:
    """The folder in which a site keeps the model of a study that was fitted to it."""
    return site.state / "adapted" / study.id


def find_adapted(site: Site, name: str) -> Path:
    """The folder of the newest model of a study, by its name or id, that is fitted to a site.

    Raises:
      SiteError: none is kept here.
    """
    kept = sorted(site.state.glob("adapted/*/model.safetensors"), key=lambda p: p.stat().st_mtime)
    studies = dict(_read_studies(kept))
    found = [path for path, study in studies.items() if name in (study.name, path.name)]
    if not found:
        known = ", ".join(f"{s.name} ({path.name})" for path, s in studies.items()) or "none yet"
        expected = f"a folder with a model, or a study that left one here: {known}"
        remedy = "Studies with adapt leave one at their end; a private one, after adapt."
        raise SiteError(site.source, expected=expected, got=name, remedy=remedy)
    return found[-1]


def _read_studies(models: Sequence[Path]) -> Iterator[tuple[Path, Study]]:
    """The folder of each model with its study, but for those of another release."""
    for path in models:
        with suppress(ConsiliumError):
            yield path.parent, Study.read(path.parent / "study.yaml")
