"""A hospital's own page shows it every figure, whatever it tells others, and no single patient."""

import csv
import html
import re

import pytest

from client.cli.main import main
from client.ledger.entries import Sent
from client.ledger.ledger import read_ledger
from client.ledger.spending import Spending
from client.reports.page import FOOTER
from client.site import Site
from tests.server.rounds.test_own_models import HEAD, TELLS, policies, run, study

SILENT = {"counts": "none", "sums": 1, "metrics": "none"}


@pytest.fixture(autouse=True)
def _own_process(new_process):
    new_process()


def write(run_main, site_file, wanted, name):
    """The page as `report` writes it, and where."""
    code, said = run_main(main, "report", site_file, name)
    assert code == 0, said
    path = Site.read(site_file).state / "reports" / f"{wanted.id}.html"
    return path, path.read_text("utf-8")


def shown(page):
    """Its text, without tags and pictures."""
    plain = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", plain)).split())


def test_it_shows_a_site_that_tells_nothing_all_of_its_own_figures(tmp_path, phantoms, run_main):
    wanted = study(holdout={"validation": 0.1, "test": 0.5})
    policy = policies(TELLS) | {"north": {"disclose": SILENT}}
    _, site_files = run(tmp_path / "run", phantoms, wanted, policy=policy)
    path, page = write(run_main, site_files[1], wanted, wanted.name)
    text = shown(page)
    assert path.stat().st_mode & 0o077 == 0
    assert FOOTER in text
    for told in ("adapted less local", "test images of 9 patients", "sensitivity", "ROC curves"):
        assert told in text
    assert "withheld all figures" in text
    assert "No ε bounds what its tensors tell" in text
    assert "svg" in page
    lines = [e for e in read_ledger(path.parents[1]) if isinstance(e, Sent)]
    assert all(line.contents.sha256[:16] in text for line in lines)
    with (phantoms / "north" / "manifest.csv").open() as file:
        for row in csv.DictReader(file):
            assert row["image"] not in page
            assert row["patient"] not in page
    first = page
    assert write(run_main, site_files[1], wanted, wanted.id)[1] == first
    assert read_ledger(path.parents[1])[-1].n == len(lines) + 1  # nothing more has left


@pytest.mark.parametrize("adapted", [False, True])
def test_a_private_study_shows_its_own_model_once_it_is_fitted(
    tmp_path, phantoms, run_main, adapted
):
    private = {"preset": "head", "epsilon": 8.0, "delta": 1e-4, "directions": 8}
    wanted = study(
        model=HEAD,
        privacy=private,
        holdout={"validation": 0.1, "test": 0.5},
    )
    _, site_files = run(tmp_path / "run", phantoms, wanted, policy=policies(TELLS))
    if adapted:
        run_main(main, "adapt", site_files[1], wanted.name)
    text = shown(write(run_main, site_files[1], wanted, wanted.name)[1])
    assert ("adapted less local" in text) == adapted
    assert ("is not compared with one of this hospital's patients alone" in text) != adapted
    site = Site.read(site_files[1])
    spent = Spending.of(read_ledger(site.state), site.policy.delta).alone(wanted.id)
    assert 7 < spent <= 8
    assert f"ε of this study {spent:.2f}" in text
    assert "one training patient, with every image, added or removed" in text


def test_a_study_that_has_not_ended_here_has_no_page(tmp_path, phantoms, run_main):
    _, site_files = run(tmp_path / "run", phantoms, study(), policy=policies(TELLS))
    code, said = run_main(main, "report", site_files[0], "another")
    assert code == 1
    assert "a study that has ended here: study" in " ".join(said.split())
