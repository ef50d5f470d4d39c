"""One site's part in one study: its images prepared, its network at hand."""

import logging
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch

from client.consent.agreement import Agreement, identity, keep_holdout, same_holdout
from client.consent.cohort import PARTS, cut, patients
from client.consent.policy import agree
from client.consent.proposals import proposed
from client.data.records import Record
from client.features.cache import prune
from client.features.extract import Recipe, prepare
from client.features.precision import chosen, settled
from client.ledger.budget import afford
from client.ledger.entries import Entry
from client.privacy import dp_sgd
from client.privacy.plan import Protection, protect
from client.privacy.sampling import Patients
from client.privacy.self_check import check_noise, check_rows
from client.site import Keep, Site
from client.storage import usable
from client.training import trainer
from client.training.dataset import Examples
from client.weights import find
from common.config.study import Augment, DpSgd, Dtype, Study
from common.errors import (
    ContractError,
    DataError,
    RefusedError,
    SiteError,
)
from common.metrics.metrics import Counts
from common.model.contract import Versions
from common.model.network import Network, assemble
from common.protocol import wire
from common.protocol.wire import (
    Figures,
    FinalCounts,
    FinalReply,
    JoinReply,
    LedgerHead,
    RoundReply,
    RoundRequest,
    Tensors,
)
from common.support.seeds import derive

log = logging.getLogger(__name__)


class Session:
    """A site in a study, ready for rounds.

    Opening it reads the data, cuts it by patient, asks the policy, and runs the frozen prefix over
    every image the cache does not have yet. Who joined a study goes on with the patients it joined
    with: others that came later are left out.

    Raises:
      ConsiliumError: whatever keeps this site from taking part, with its remedy.
    """

    def __init__(self, site: Site, study: Study) -> None:
        self.site, self.study = site, study
        self.classes = len(study.classes)
        self.disclosure = site.policy.disclose.resolved(private=study.private)
        self.agreement = Agreement.kept(site, study.id)
        self.protection = self.agreement.protection if self.agreement else self._protection()
        same_holdout(site, study)
        found = cut(site, study)
        parts = {part: self._taking_part(part, getattr(found, part)) for part in PARTS}
        self._agree(patients(parts["train"]), len(parts["train"]))
        self.network = assemble(study, find(site, study))
        self.device = chosen(site.device)
        if held := self.network.held:
            log.info("not trained with privacy: %s", ", ".join(held))
        self.network.model.to(self.device)
        self.recipe = _recipe(self.network, study.model.precision, study.private, site.keep)
        self.examples: dict[str, Examples] = {}
        self.patients: dict[str, int] = {}
        self._checked = False
        self._make_room()
        kept = [name for part, records in parts.items() for name in self._prepare(part, records)]
        self._make_room()
        # Again: unreadable images may have been left out.
        self._agree(self.patients["train"], len(self.examples["train"]))
        self._now = self._agreement(kept)

    def _agree(self, trained: int, images: int) -> None:
        if self.site.role == "train" and not trained:
            where, expected = f"{self.site.source}: data", "at least one training patient"
            remedy = "Add patients, lower holdout, or set role: evaluate."
            raise DataError(where, expected=expected, got=trained, remedy=remedy)
        agree(self.site, self.study, self.protection, trained, images)

    def _taking_part(self, part: str, records: Sequence[Record]) -> list[Record]:
        """Those that the site joined with; all of them if it has not joined yet."""
        if self.agreement is None:
            return list(records)
        joined, secret = set(self.agreement.records), self.site.secret()
        return [r for r in records if identity(r, part, self.site, secret) in joined]

    def _make_room(self) -> None:
        """Delete prepared images of other studies, as far as the site asks for it."""
        folder, cache = self.site.cache_folder, self.site.cache
        prune(folder, limit=cache.limit, days=cache.days, keep={folder / self.recipe.key})

    def _prepare(self, part: str, records: Sequence[Record]) -> list[str]:
        """Keep what rounds need of these records; the images themselves may go.

        Returns:
          `identity` of each that takes part.
        """
        prepared, kept = prepare(
            [record.image for record in records],
            recipe=self.recipe,
            augment=self.study.images.augment if part == "train" else Augment(),
            cache=self.site.cache_folder,
            skip_unreadable=self.study.images.unreadable == "skip",
        )
        labels = torch.tensor([records[i].label for i in kept], dtype=torch.int64)
        self.examples[part] = Examples(prepared, labels)
        self.patients[part] = patients([records[i] for i in kept])
        if part == "train":
            self._whose = Patients.of([records[i].patient for i in kept])
        secret = self.site.secret()
        return [identity(records[i], part, self.site, secret) for i in kept]

    def joined(self, ledger: LedgerHead, entries: Sequence[Entry]) -> JoinReply:
        """Agree, on disk, and tell the server what this site tells about itself.

        Joining again, the site may tell less than before, and count without patients who left;
        nobody who was not there at first is let in.

        Args:
          ledger: How far this site's ledger goes.
          entries: Of that ledger: who cannot pay for all rounds does not begin.

        Raises:
          BudgetError: the site's privacy budget does not suffice.
        """
        if self.agreement is None:
            self._afford(entries, whole=True)
        now = self._now
        if now != self.agreement:
            keep_holdout(self.site, self.study)
            now.keep(self.site)
            self.agreement = now
        disclosure, silent = now.disclosure, self.study.private
        patients = {p: disclosure.number(n) for p, n in now.patients.model_dump().items()}
        images = {p: disclosure.numbers(n) for p, n in now.images.model_dump().items()}
        if silent:  # how many train is theirs to keep: no noise protects a number told at join
            patients["train"] = images["train"] = None
        return JoinReply(
            name=self.site.name,
            role=self.site.role,
            contract=self.network.contract,
            disclosure=disclosure,
            patients=wire.Parts(**patients),
            images=wire.Parts(**images),
            enrolled=now.protection.enrolled if now.protection and disclosure.tells else None,
            ledger=ledger,
            versions=Versions.here(),
        )

    def _agreement(self, records: Sequence[str]) -> Agreement:
        """What this site would agree to as it is, if nobody new is let in."""
        counts = {p: e.labels.bincount(minlength=self.classes) for p, e in self.examples.items()}
        first = self.agreement
        return Agreement(
            study=self.study.id,
            role=self.site.role,
            disclosure=self.disclosure,
            protection=self.protection,
            patients=wire.Parts(**self.patients),
            images=wire.Parts(**{p: tuple(count.tolist()) for p, count in counts.items()}),
            records=first.records if first else tuple(sorted(records)),
        )

    def _protection(self) -> Protection | None:
        privacy = self.study.privacy
        if not isinstance(privacy, DpSgd) or self.site.role != "train":
            return None
        return protect(self.site, self.study, privacy)

    def allow(self, entries: Sequence[Entry], tensors: Tensors) -> None:
        """Return if a private round may be drawn: it can be paid for, and the mechanism is right.

        Args:
          entries: Of the site's ledger.
          tensors: Those received, on which the mechanism is checked.

        Raises:
          RefusedError: it cannot be paid for, or the mechanism failed its own check.
        """
        protection = self.agreed().protection
        self._afford(entries, whole=False)
        if protection is None:
            return
        if not self._checked:
            check_noise(protection)
            self._checked = True
        self.network.load(tensors)
        with settled(self.site.threads):
            check_rows(self.network.split.suffix, self.examples["train"], protection)

    def _afford(self, entries: Sequence[Entry], *, whole: bool) -> None:
        protection, privacy = self.protection, self.study.privacy
        if protection and isinstance(privacy, DpSgd):
            planned = protection.whole if whole else protection.round.segment
            afford(entries, self.site, self.study, privacy, planned)

    def agreed(self) -> Agreement:
        """What was agreed at join, if it still holds.

        Raises:
          ContractError: this site has not joined the study.
          RefusedError: its policy now allows it to tell less than it agreed to.
          DataError: other patients take part than it joined with.
        """
        kept, now = self.agreement, self._now
        if kept and kept.role == "train" and bool(kept.protection) != self.study.private:
            raise ContractError("an agreement about another kind of privacy than the study's")
        remedy = "It can take part again when the coordinator resumes the run."
        if kept is None:
            raise ContractError(f"this site has not joined study {self.study.id!r}")
        if not kept.disclosure.within(now.disclosure):
            where, got = f"{self.site.source}: policy.disclose", "less"
            expected = "what was agreed at join"
            raise RefusedError(where, expected=expected, got=got, remedy=remedy)
        if (kept.role, kept.images, kept.patients) != (now.role, now.images, now.patients):
            where, got = f"{self.site.source}: data", "fewer, or another role"
            expected = "the patients that it joined with"
            raise DataError(where, expected=expected, got=got, remedy=remedy)
        return kept

    def work(self, request: RoundRequest, tensors: Tensors, ledger: LedgerHead) -> RoundReply:
        """One round: evaluate what came on validation patients, then train it; tell as agreed.

        Args:
          request: What the server asks for.
          tensors: What came with it.
          ledger: How far this site's ledger goes.
        """
        agreed = self.agreed()
        disclosure, protection = agreed.disclosure, agreed.protection
        if protection:
            self.train_privately(tensors, request.round, request.proximal_mu, protection)
            arrays = wire.to_arrays(self.network.tensors)
            return RoundReply(arrays=arrays, figures=None, ledger=ledger)
        tells = disclosure.metrics == "every_round"
        counts = disclosure.coarse(self.evaluate(tensors, "validation")) if tells else None
        loss = self.train(tensors, request.round, request.proximal_mu)
        loss_told = loss if disclosure.tells_scores else None
        figures = Figures(train_loss=loss_told, counts=counts) if counts else None
        arrays = wire.to_arrays(self.network.tensors)
        return RoundReply(arrays=arrays, figures=figures, ledger=ledger)

    def finish(self, released: Tensors) -> FinalReply:
        """The end: counts of the released model, as agreed."""
        disclosure = self.agreed().disclosure
        if disclosure.metrics == "none":
            return FinalReply(counts=None)
        counts = FinalCounts(
            validation=disclosure.coarse(self.evaluate(released, "validation")),
            test=disclosure.coarse(self.evaluate(released, "test")),
        )
        return FinalReply(counts=counts)

    def train(self, tensors: Tensors, round_number: int, proximal_mu: float) -> float:
        """Train the received tensors on this site's training patients; returns the mean loss.

        The result is in `self.network.tensors`.
        """
        self.network.load(tensors)
        plan = self.study.train
        with settled(self.site.threads):
            return trainer.train(
                self.network.split.suffix,
                self.examples["train"],
                plan,
                classes=self.classes,
                lr=trainer.learning_rate(plan, round_number),
                seed=derive(self.study.seed, self.site.name, round_number, "train"),
                proximal_mu=proximal_mu,
                dtype=self.study.model.precision,
            )

    def train_privately(
        self, tensors: Tensors, round_number: int, proximal_mu: float, protection: Protection
    ) -> None:
        """Train the received tensors with differential privacy; result in `self.network.tensors`.

        Draws from the operating system's entropy: no two results are the same.
        """
        self.network.load(tensors)
        plan = self.study.train
        with settled(self.site.threads):
            dp_sgd.train(
                self.network.split.suffix,
                self.examples["train"],
                self._whose,
                plan,
                protection,
                lr=trainer.learning_rate(plan, round_number),
                proximal_mu=proximal_mu,
            )

    def evaluate(self, tensors: Tensors, part: str) -> Counts:
        """Counts of the received tensors on one part of this site's patients."""
        self.network.load(tensors)
        with settled(self.site.threads):
            return trainer.evaluate(self.network.split.suffix, self.examples[part], self.classes)


@lru_cache(maxsize=8)
def _recipe(network: Network, dtype: Dtype, private: bool, keep: Keep) -> Recipe:
    return Recipe.of(network, dtype, keep, private=private)


def open_session(site_file: Path, study_id: str) -> Session:
    """The session of a site in a study it was sent; loaded once per process and site file as it is.

    Raises:
      ContractError: this site was never sent that study.
    """
    with usable(site_file, SiteError):
        now = site_file.stat()
    return _session(site_file, (now.st_mtime_ns, now.st_size, now.st_ino), study_id)


def close_sessions(*, beyond: int = 0) -> None:
    """Let go of the sessions of this process, if there are more than `beyond`."""
    if _session.cache_info().currsize > beyond:
        _session.cache_clear()


@cache  # with a limit, more virtual sites than that would all be opened anew in every round
def _session(site_file: Path, _: tuple[int, ...], study_id: str) -> Session:
    site = Site.read(site_file)
    return Session(site, proposed(site, study_id))
