"""An engine that audits: coins decide who trains, and an adversary guesses them."""

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from client.app import find_site_file
from client.consent.exclusions import exclude_patient
from client.preparation import PreparedSite
from common.config.study import Study
from common.errors import RefusedError, RunError
from server.app import app as server_app
from server.runs.run_folder import RunFolder
from simulations.engines.adversary import Canaries, overhear
from simulations.engines.base import InProcess
from simulations.engines.grid import simulate_run

AUDIT = "audit.json"
"""The file of a run with its coins and scores."""


class Audited(InProcess):
    """An engine in this process, with the real ClientApp, in which some patients are canaries.

    Args:
      most: Canaries of all sites together; at most half of a site's patients.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._canaries: dict[Path, Canaries] = {}

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Prepare every hospital's images; then half of the canaries leave, as coins fall."""
        super().prepare(site_files, study)
        self._canaries = self._draw(site_files, study)
        self.forget()  # those who left were prepared, too
        super().prepare(site_files, study)

    def _draw(self, site_files: Sequence[Path], study: Study) -> dict[Path, Canaries]:
        everyone = {}
        for path in site_files:
            try:
                prepared = self.runtime.open_session(path, study.id).prepared
            except RefusedError:
                continue  # it refuses the study at join as well
            if prepared.site.role == "train":
                everyone[path] = prepared
        patients = sum(len(prepared.owners.counts) for prepared in everyone.values())
        share = min(0.5, self._most / max(patients, 1))
        return {path: _throw_coins(prepared, share) for path, prepared in everyone.items()}

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Run from the beginning, and write how well the coins were guessed."""
        if not self._canaries:
            raise explain_interrupted(folder)

        def app(message: Message, context: Context) -> Message:
            reply, path = self.app(message, context), find_site_file(context)
            if path in self._canaries and not reply.has_error():
                overhear(self._canaries[path], message, reply)
            return reply

        try:
            simulate_run(server_app, app, site_files, folder)
        except BaseException:
            shutil.rmtree(folder)  # its coins are forgotten: it begins anew, or not at all
            raise
        finally:
            self.runtime.close_sites()
        run = RunFolder(folder)
        if (last := run.read_last()) is None:  # of a run without rounds and without a head
            raise RunError(folder, expected="a released model", got="none")
        found = {
            one.prepared.site.name: {
                "included": one.included.tolist(),
                "sums": one.guess().tolist() if one.seen else None,
                "model": one.judge(last.released[1]).tolist(),
            }
            for one in self._canaries.values()
        }
        self._canaries = {}
        run.write(AUDIT, json.dumps(found))


def explain_interrupted(folder: Path) -> RunError:
    """Why an audit cannot go on."""
    expected, got = "an audit that ran to its end", "one that was interrupted"
    remedy = "Its coins are forgotten: delete the folder, and audit again."
    return RunError(folder, expected=expected, got=got, remedy=remedy)


def _throw_coins(prepared: PreparedSite, share: float) -> Canaries:
    """Choose this share of a site's patients; of each, a coin decides whether he goes."""
    chance = secrets.SystemRandom()
    patients = list(dict.fromkeys(record.patient for record in prepared.list_records("train")))
    chosen = sorted(chance.sample(range(len(patients)), int(share * len(patients))))
    included = [chance.random() < 0.5 for _ in chosen]
    for number, stays in zip(chosen, included, strict=True):
        if not stays:
            exclude_patient(prepared.site, patients[number])
    return Canaries(prepared, np.array(chosen, np.int64), np.array(included, np.bool_))
