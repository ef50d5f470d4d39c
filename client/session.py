"""One site at work in one study: it joins, works a round, evaluates, finishes."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from client.consent.agreement import Agreement, check_agreement
from client.consent.holdout import check_holdout, keep_holdout
from client.features.precision import fix_numerics
from client.ledger.budget import check_budget, check_times
from client.ledger.entries import Entry
from client.preparation import PreparedSite
from client.privacy import dp_sgd
from client.privacy.held_out import noise_counts
from client.privacy.noised_rows import choose_rows, make_rows, noise_rows
from client.privacy.parameters import TrainingRelease
from client.privacy.plan import PrivacyPlan
from client.privacy.rounding import Rounding
from client.privacy.self_check import check_noise, check_rows
from client.training import trainer
from client.training.head_features import compute_head_features, count_heads
from common.config.study import Private
from common.errors import ContractError
from common.heads.read_out import AS_IT_IS, ReadOut
from common.heads.sums import Sums, map_features
from common.metrics.counts import Counts, Floats
from common.model.contract import Versions
from common.protocol.fields import ByPart
from common.protocol.final import FinalCounts, FinalReply
from common.protocol.join import JoinReply
from common.protocol.ledger import LedgerHead
from common.protocol.noised import NoisedReply
from common.protocol.round import Figures, RoundReply, RoundRequest
from common.protocol.tensors import Tensors, to_arrays
from common.protocol.validate import ValidateReply
from common.support.seeds import derive


class Session:
    """A site in a study, from its join to its end.

    Args:
      prepared: The site with its images prepared for the study.
    """

    def __init__(self, prepared: PreparedSite) -> None:
        self.prepared = prepared
        self._agreed = prepared.agreed
        self._noise_checked = False

    def join(self, ledger: LedgerHead, entries: Sequence[Entry]) -> JoinReply:
        """Agree, on disk, and tell the server what this site tells about itself.

        Joining again, the site may tell less than before, and count without patients who left;
        nobody who was not there at first is let in. A policy that tells more is for new studies.

        Args:
          ledger: How far this site's ledger goes.
          entries: Of that ledger: who cannot pay for all rounds does not begin.

        Raises:
          BudgetError: the site's privacy budget does not suffice.
        """
        prepared, offer = self.prepared, self.prepared.offer
        site, study = prepared.site, prepared.study
        if self._agreed is None:
            self._afford(entries, None)
        elif not offer.disclosure.within(self._agreed.disclosure):
            kept = {"disclosure": self._agreed.disclosure, "end": self._agreed.end}
            offer = offer.model_copy(update=kept)
        if offer != self._agreed:
            offer.keep(site)
            self._agreed = offer
        disclosure = offer.disclosure
        rounding = Rounding(site.secret(), disclosure.base)
        told = [*["train"] * disclosure.tells, *["validation", "test"] * disclosure.tells_held_out]
        if study.private:  # how many train is theirs to keep: no noise protects a number at join
            told = told[disclosure.tells :]
        patients = {
            part: rounding.round_number(n, "patients", part) if part in told else None
            for part, n in offer.patients.model_dump().items()
        }
        images = {
            part: rounding.round_images(n, part) if part in told else None
            for part, n in offer.images.model_dump().items()
        }
        declared = offer.privacy_plan.enrolled if offer.privacy_plan else None
        return JoinReply(
            name=site.name,
            role=site.role,
            contract=prepared.network.contract,
            disclosure=disclosure,
            patients=ByPart(**patients),
            images=ByPart(**images),
            enrolled=declared if disclosure.tells else None,
            ledger=ledger,
            versions=Versions.here(),
        )

    def agreed(self) -> Agreement:
        """What was agreed at join, if it still holds.

        Raises:
          ContractError: this site has not joined the study.
          RefusedError: its policy now allows it to tell less than it agreed to.
          DataError: other patients take part than it joined with.
        """
        prepared = self.prepared
        return check_agreement(prepared.site, prepared.study, self._agreed, prepared.offer)

    def allow(
        self, entries: Sequence[Entry], tensors: Tensors, kind: TrainingRelease = "round"
    ) -> None:
        """Return if a private answer may be drawn: it can be paid for, and the mechanism is right.

        Args:
          entries: Of the site's ledger.
          tensors: Those received, on which the mechanism of a round is checked.
          kind: To which query.

        Raises:
          RefusedError: it cannot be paid for, or the mechanism failed its own check.
        """
        prepared, privacy_plan = self.prepared, self.agreed().privacy_plan
        self._afford(entries, kind)
        if privacy_plan is None:
            return
        check_holdout(prepared.site, prepared.study)  # another study may have drawn since the join
        if not self._noise_checked:
            check_noise(privacy_plan)
            self._noise_checked = True
        if kind == "round":
            prepared.network.load(tensors)
            with fix_numerics(prepared.site.threads):
                check_rows(prepared.network.split.suffix, prepared.examples["train"], privacy_plan)
        keep_holdout(prepared.site, prepared.study)

    def _afford(self, entries: Sequence[Entry], kind: TrainingRelease | None) -> None:
        """Of one answer to a query of this kind, or of all that are planned."""
        prepared = self.prepared
        privacy_plan, privacy = prepared.privacy_plan, prepared.study.privacy
        if privacy_plan and isinstance(privacy, Private):
            query = privacy_plan.find(kind) if kind else None
            planned = [query.after(1)] if query else privacy_plan.whole
            check_budget(entries, prepared.site, prepared.study, privacy, planned)
            if query:
                check_times(entries, prepared.study, query.kind, query.times)

    def tell_noised(self, kind: TrainingRelease, whitening: Tensors) -> NoisedReply:
        """The sum of a row of each training patient, with noise, for a private head.

        Args:
          kind: Which of the two sums.
          whitening: The tensors by which features are read.
        """
        privacy_plan = self.agreed().privacy_plan
        if privacy_plan is None:
            raise ContractError("noised sums of a site that trains without privacy")
        prepared = self.prepared
        prepared.network.load({**prepared.network.initial, **whitening})
        classes, directions = len(prepared.study.classes), prepared.study.directions or 0
        make_row, size = choose_rows(kind, classes, directions)
        suffix, examples = prepared.network.split.suffix, prepared.examples["train"]
        with fix_numerics(prepared.site.threads):
            rows = make_rows(suffix, examples, prepared.owners, make_row)
            return NoisedReply(sums=noise_rows(rows, privacy_plan.find(kind).release, size))

    def work(self, request: RoundRequest, tensors: Tensors, ledger: LedgerHead) -> RoundReply:
        """One round: evaluate what came on validation patients, then train it; tell as agreed.

        Args:
          request: What the server asks for.
          tensors: What came with it.
          ledger: How far this site's ledger goes.
        """
        agreed = self.agreed()
        disclosure, privacy_plan = agreed.disclosure, agreed.privacy_plan
        figures = None
        if privacy_plan:
            self._train_privately(tensors, request.round, request.proximal_mu, privacy_plan)
        else:
            tells = disclosure.metrics == "every_round"  # only where all counts are exact
            counts = self.evaluate(tensors, "validation") if tells else None
            loss = self.train(tensors, request.round, request.proximal_mu)
            figures = Figures(train_loss=loss, counts=counts) if counts else None
        arrays = to_arrays(self.prepared.network.tensors)
        return RoundReply(arrays=arrays, figures=figures, ledger=ledger)

    def validate(self, model: Tensors, read_outs: Sequence[ReadOut]) -> ValidateReply:
        """How a model does on validation images, and its loss under each read-out.

        Raises:
          ContractError: the site agreed to tell no figures before the end.
        """
        if self.agreed().disclosure.metrics != "every_round":
            raise ContractError("figures that this site agreed not to tell")
        return self.judge(model, read_outs)

    def judge(self, model: Tensors, read_outs: Sequence[ReadOut]) -> ValidateReply:
        """The same, for this machine alone."""
        logits, labels = self.compute_logits(model, "validation")
        losses = [Counts.of(logits, labels, each.scores(logits)).loss_sum for each in read_outs]
        return ValidateReply(counts=Counts.of(logits, labels), losses=losses)

    def finish(self, released: Tensors, read_out: ReadOut = AS_IT_IS) -> FinalReply:
        """The end: counts of the released model, as agreed."""
        if self.agreed().disclosure.metrics == "none":
            return FinalReply(counts=None)
        validation, test = self.tell(released, "validation", "test", read_out=read_out)
        return FinalReply(counts=FinalCounts(validation=validation, test=test))

    def tell(self, model: Tensors, *parts: str, read_out: ReadOut = AS_IT_IS) -> list[Counts]:
        """Counts of a model on parts of this site's patients, as coarse or noised as it tells them.

        Args:
          model: The tensors to evaluate.
          parts: Of `validation` and `test`, each once.
          read_out: Of its probabilities, where scores are told.
        """
        agreed, drawn = self._agreed or self.prepared.offer, self.prepared.drawn
        if agreed.end is not None:
            return noise_counts([self.evaluate(model, p, drawn[p]) for p in parts], agreed.end)
        rounding = Rounding(self.prepared.site.secret(), agreed.disclosure.base)
        name = self.prepared.network.digest(model)
        found = {p: self.evaluate(model, p, read_out=read_out) for p in parts}
        return [rounding.round_counts(counts, part, name) for part, counts in found.items()]

    def sum_all_features(self) -> tuple[int, Floats]:
        """How many training images have features that are all finite, and the sum of these [d].

        Of an image with several views, the mean of them.
        """
        features = np.mean([*self.view_features("train")], axis=0)
        good = features[np.isfinite(features).all(axis=1)]
        return len(good), good.sum(axis=0)

    def sum_features(self, weights: Floats, centre: Floats) -> Sums:
        """The sums of this site's training images, for a head that is solved from them.

        The views of an image count as one image together.

        Args:
          weights: [K], of each class.
          centre: [d], taken off each image's features.
        """
        labels = self.prepared.examples["train"].labels.numpy()
        views = [map_features(features, centre) for features in self.view_features("train")]
        return Sums.mean([Sums.of(features, labels, weights) for features in views])

    def compare_heads(self, heads: Sequence[tuple[Tensor, Tensor]], centre: Floats) -> list[Counts]:
        """The counts of heads on this site's validation images, where it tells them each round.

        Args:
          heads: The weight [K, d] and bias [K] of each.
          centre: [d], taken off each image's features.
        """
        if self.agreed().disclosure.metrics != "every_round":
            raise ContractError("figures that this site agreed not to tell")
        return self.count_heads(heads, centre)

    def count_heads(self, heads: Sequence[tuple[Tensor, Tensor]], centre: Floats) -> list[Counts]:
        """The same, for this machine alone."""
        labels = self.prepared.examples["validation"].labels
        features = map_features(self.compute_features("validation"), centre)
        return count_heads(features, labels, heads)

    def view_features(self, part: str) -> Iterator[Floats]:
        """What the head reads of each view of the images of a part, the images themselves first."""
        views = self.prepared.examples[part].prepared.views
        return (self.compute_features(part, view) for view in range(views))

    def compute_features(self, part: str, view: int = 0) -> Floats:
        """What the head reads of the images of a part, by the backbone as it was at first."""
        prepared = self.prepared
        prepared.network.load(prepared.network.initial)
        suffix, examples = prepared.network.split.suffix, prepared.examples[part]
        with fix_numerics(prepared.site.threads):
            return compute_head_features(suffix, examples, prepared.network.width, view)

    def train(self, tensors: Tensors, round_number: int, proximal_mu: float) -> float:
        """Train the received tensors on this site's training patients; returns the mean loss.

        The network holds the result.
        """
        prepared, study = self.prepared, self.prepared.study
        prepared.network.load(tensors)
        with fix_numerics(prepared.site.threads):
            return trainer.train(
                prepared.network.split.suffix,
                prepared.examples["train"],
                study.train,
                classes=len(study.classes),
                lr=trainer.learning_rate(study.train, round_number),
                seed=derive(study.seed, prepared.site.name, round_number, "train"),
                proximal_mu=proximal_mu,
                dtype=study.model.precision,
            )

    def _train_privately(
        self, tensors: Tensors, round_number: int, proximal_mu: float, privacy_plan: PrivacyPlan
    ) -> None:
        """Train with differential privacy; the network holds the result.

        It draws from the operating system's entropy: no two results are the same.
        """
        prepared, plan = self.prepared, self.prepared.study.train
        prepared.network.load(tensors)
        with fix_numerics(prepared.site.threads):
            dp_sgd.train(
                prepared.network.split.suffix,
                prepared.examples["train"],
                prepared.owners,
                plan,
                privacy_plan,
                lr=trainer.learning_rate(plan, round_number),
                proximal_mu=proximal_mu,
            )

    def compute_logits(self, tensors: Tensors, part: str) -> tuple[Tensor, Tensor]:
        """Logits of the received tensors on a part, float32 [n, K] on the CPU, and labels [n]."""
        prepared, classes = self.prepared, len(self.prepared.study.classes)
        prepared.network.load(tensors)
        with fix_numerics(prepared.site.threads):
            suffix = prepared.network.split.suffix
            return trainer.compute_logits(suffix, prepared.examples[part], classes)

    def evaluate(
        self,
        tensors: Tensors,
        part: str,
        some: Tensor | None = None,
        read_out: ReadOut = AS_IT_IS,
    ) -> Counts:
        """Counts of the received tensors on one part of this site's images, all or some of them."""
        prepared, classes = self.prepared, len(self.prepared.study.classes)
        prepared.network.load(tensors)
        with fix_numerics(prepared.site.threads):
            suffix = prepared.network.split.suffix
            return trainer.evaluate(suffix, prepared.examples[part], classes, some, read_out)
