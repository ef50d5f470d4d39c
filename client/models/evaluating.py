"""A released model on labelled images of a site: it reads them as it is, nothing is fitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.consent.agreement import Agreement
from client.consent.cohort import list_cohort
from client.consent.exclusions import drop_excluded
from client.consent.proposals import read_proposal
from client.data.records import Record
from client.features.extract import FeatureSpec, prepare_images
from client.features.precision import choose_device
from client.features.store import Stores
from client.site import Site
from common.config.study import Augment
from common.errors import DataError
from common.heads.read_out import ReadOut
from common.metrics.by_patient import Evidence, Tested, compare_ways
from common.metrics.counts import Counts
from common.model.inference import ReleasedModel


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What a model says of labelled images.

    Attributes:
      records: The images that could be read.
      logits: Float32 [n, K].
      unreadable: How many images could not be read, and are left out.
    """

    records: Sequence[Record]
    logits: Tensor
    unreadable: int

    @property
    def patients(self) -> int:
        """How many patients they are of."""
        return len({record.patient for record in self.records})

    def count(self, read_out: ReadOut) -> Counts:
        """Count decisions, and probabilities by this read-out."""
        labels = torch.tensor([record.label for record in self.records])
        return Counts.of(self.logits, labels, read_out.scores(self.logits))

    def estimate(self, read_out: ReadOut, way: str, select: str, *, seed: int) -> Evidence:
        """Estimate figures with intervals by patient, as those of a way of training.

        Args:
          read_out: Of its probabilities.
          way: The name of the way.
          select: The metric beside AUROC.
          seed: Of the resampling of patients.
        """
        number = {patient: i for i, patient in enumerate({r.patient: 0 for r in self.records})}
        tested = Tested(
            labels=np.array([record.label for record in self.records]),
            patients=np.array([number[record.patient] for record in self.records]),
            logits={way: self.logits.double().numpy()},
            scores={way: read_out.scores(self.logits).numpy()},
        )
        return compare_ways(tested, select, (), seed=seed)


def evaluate_model(
    model: ReleasedModel, records: Sequence[Record], *, cache: Path, device: str
) -> Evaluated:
    """Let a model read images; what it said of one before, it need not say again.

    Args:
      model: Moved to the device.
      records: Labelled by position in the model's classes.
      cache: The folder of prepared images, which keeps the logits too.
      device: As a site file names it.

    Raises:
      DataError: none of the images can be read.
    """
    network = model.network.to(chosen := choose_device(device))
    spec = FeatureSpec(
        prefix=network, preprocess=model.preprocess, device=chosen, name="logits of a model"
    )
    prepared, kept = prepare_images(
        [record.image for record in records],
        spec=spec,
        augment=Augment(),
        cache=cache,
        stores=Stores(),
        skip_unreadable=True,
    )
    if not kept:
        expected, got = "labelled images", f"{len(records)} that cannot be read"
        raise DataError("evaluate", expected=expected, got=got)
    logits = prepared.rows[torch.arange(len(kept))].cpu()
    return Evaluated([records[i] for i in kept], logits, len(records) - len(kept))


def list_unseen(site: Site, model: ReleasedModel) -> list[Record]:
    """The records of a site that no training of a model saw: all, unless it is in the study.

    Of a site that joined the study, they are those of its test patients.
    """
    study = model.about.study_id
    agreed = Agreement.kept(site, study)
    if agreed is not None:
        return list_cohort(site, read_proposal(site, study), agreed)["test"]
    return drop_excluded(site, site.data.records(model.classes))
