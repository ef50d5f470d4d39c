"""Hospitals that attack a study, to see which strategies hold."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, Message

from client.app import find_site_file
from client.session import Session
from client.site import Site
from common.config.study import Study
from common.model.weights import LARGEST
from common.protocol.tensors import to_arrays
from server.app import app as server_app
from server.runs.run_folder import RunFolder
from simulations.engines.base import InProcess
from simulations.engines.grid import simulate_run

ATTACKS = "lies.json"
"""The file of a run in which hospitals may attack."""


@dataclass(frozen=True)
class Attacks:
    """The hospitals that attack, by name, and their ways.

    Attributes:
      mislabels: Hospitals that take each class for the next when they train.
      scales: Hospitals that send `factor` times the change that training made.
      factor: The factor of `scales`; below 0 the change is reversed.
    """

    mislabels: frozenset[str] = frozenset()
    scales: frozenset[str] = frozenset()
    factor: float = -10.0

    @property
    def attackers(self) -> frozenset[str]:
        """All hospitals that attack."""
        return self.mislabels | self.scales

    def to_json(self) -> str:
        """Write the attacks as JSON, as a run keeps them."""
        names = {"mislabels": sorted(self.mislabels), "scales": sorted(self.scales)}
        return json.dumps({**names, "factor": self.factor if self.scales else None})


class Attacked(InProcess):
    """An engine in this process, with the real ClientApp, in which some hospitals attack."""

    def __init__(self, attacks: Attacks) -> None:
        super().__init__()
        self._attacks = attacks

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Run from the last finished round on."""
        run = RunFolder(folder)
        run.write(ATTACKS, self._attacks.to_json())
        study = run.study
        names = {path: Site.read(path).name for path in site_files}
        self.forget()  # none is mislabelled twice
        for path in site_files:
            if names[path] in self._attacks.mislabels:
                _mislabel(self.runtime.open_session(path, study.id), study)

        def app(message: Message, context: Context) -> Message:
            reply = self.app(message, context)
            trained = message.metadata.message_type == "train" and not reply.has_error()
            if trained and names[find_site_file(context)] in self._attacks.scales:
                _scale(message, reply, self._attacks.factor)
            return reply

        try:
            simulate_run(server_app, app, site_files, folder)
        finally:
            self.runtime.close_sites()


def _mislabel(session: Session, study: Study) -> None:
    labels = session.prepared.examples["train"].labels
    labels.copy_((labels + 1) % len(study.classes))


def _scale(request: Message, reply: Message, factor: float) -> None:
    """Multiply what training changed, as far as the server would still take it."""
    (sent,) = request.content.array_records.values()
    (trained,) = reply.content.array_records.values()
    before, after = (
        {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}
        for arrays in (sent, trained)
    )
    for name, tensor in after.items():
        told = before[name] + factor * (tensor - before[name])
        after[name] = told.clamp(-LARGEST, LARGEST)
    trained.update(to_arrays(after))
