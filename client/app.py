"""The hospital's Flower ClientApp: parse, agree, work, record, reply. The error boundary."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.consent.agreement import Agreement, check_end
from client.consent.approval import check_approval
from client.consent.proposals import drop_proposal, keep_proposal, parse_proposal, read_proposal
from client.ledger.budget import check_noise_once, check_studies
from client.ledger.entries import Release
from client.ledger.release import Reply, record_errors, release
from client.models.own import finish
from client.models.released import KeptModel
from client.privacy.parameters import TrainingRelease
from client.runtime import Runtime, SiteRuntime
from client.session import Session
from client.site import Site
from client.weights import receive_part
from common.config.study import Study
from common.errors import (
    ConsiliumError,
    ContractError,
    DataError,
    MissingWeightsError,
    RefusedError,
    SiteError,
    WaitingError,
)
from common.flower.messages import (
    ClientAppCallable,
    make_error_reply,
    record_from_bytes,
    record_to_bytes,
)
from common.heads.read_out import AS_IT_IS
from common.protocol.backbone import BackboneHeld, BackbonePart
from common.protocol.fields import CONFIG, STUDY, get_value
from common.protocol.final import FinalReply, FinalRequest
from common.protocol.join import JoinReply, JoinRequest, lack_backbone
from common.protocol.ledger import LedgerReply, LedgerRequest
from common.protocol.noised import NoisedReply, NoisedRequest
from common.protocol.round import RoundReply, RoundRequest
from common.protocol.sums import (
    CandidatesReply,
    CandidatesRequest,
    MeansReply,
    MeansRequest,
    SumsReply,
    SumsRequest,
)
from common.protocol.tensors import from_arrays
from common.protocol.validate import ValidateReply, ValidateRequest, check_read_outs

log = logging.getLogger(__name__)

Answer = (
    JoinReply
    | MeansReply
    | SumsReply
    | NoisedReply
    | CandidatesReply
    | ValidateReply
    | RoundReply
    | FinalReply
)


def make_app(runtime: Runtime) -> ClientApp:
    """The ClientApp of all sites that `runtime` keeps open."""
    app, handlers = ClientApp(mods=[boundary]), Handlers(runtime)
    app.query()(handlers.join)
    app.query("backbone")(handlers.take_backbone)
    app.query("ledger")(handlers.tell_ledger)
    app.query("means")(handlers.tell_means)
    app.query("sums")(handlers.tell_sums)
    app.query("candidates")(handlers.compare_heads)
    app.query("moments")(partial(handlers.tell_noised, "moments"))
    app.query("prototypes")(partial(handlers.tell_noised, "prototypes"))
    app.query("validate")(handlers.validate)
    app.train()(handlers.work_round)
    app.evaluate()(handlers.finish)
    return app


def boundary(message: Message, context: Context, work: ClientAppCallable) -> Message:
    """Answer any failure with its public code; the text stays in this site's log."""
    try:
        return work(message, context)
    except WaitingError as ex:  # said when it came; it is asked for again and again
        return make_error_reply(message, ex.code)
    except ConsiliumError as ex:
        text, site = str(ex), str(context.node_config.get("site"))
        log.error("%s", text if text.startswith(site) else f"{site}: {text}")
        return make_error_reply(message, ex.code)
    except Exception:
        log.exception("an error nobody foresaw")
        return make_error_reply(message, ConsiliumError.code)


class Handlers:
    """A method for each message that a server may send."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def join(self, message: Message, context: Context) -> Message:
        """Read the proposal, agree or refuse, prepare every image."""
        request = JoinRequest.read(message.content)
        site = Site.read(find_site_file(context))
        opened = self._runtime.open_site(site)
        if request.known is not None:
            opened.ledger.check_receipt(request.known)
        study = parse_proposal(request.proposal)
        check_studies(opened.ledger.began, site, study)
        check_approval(site, study)
        keep_proposal(site, study)
        for ended in opened.ledger.ended - {study.id}:
            opened.outbox.purge(ended, keep=opened.ledger.sealed_ends(ended))
        what = Release(study=study.id, name=study.name, kind="join")
        try:
            with record_errors(opened.ledger, what):
                session = self._runtime.open_session(find_site_file(context), study.id)
                return _leave(
                    message,
                    opened,
                    what,
                    lambda: session.join(opened.ledger.head, opened.ledger.spending),
                )
        except MissingWeightsError as ex:
            log.info("%s", ex)
            return Message(lack_backbone(), reply_to=message)
        except (RefusedError, DataError):
            drop_proposal(site, study)
            raise

    def take_backbone(self, message: Message, context: Context) -> Message:
        """A piece of the backbone, for a site without a copy; nothing of a patient leaves."""
        part = BackbonePart.read(message.content)
        site = Site.read(find_site_file(context))
        held = receive_part(site, read_proposal(site, part.study), part)
        return Message(BackboneHeld(held).record(), reply_to=message)

    def tell_ledger(self, message: Message, context: Context) -> Message:
        """The hash of one line of this site's ledger; of no patient, and so not a line itself."""
        request = LedgerRequest.read(message.content)
        opened = self._runtime.open_site(Site.read(find_site_file(context)))
        reply = LedgerReply(opened.ledger.hash_at(request.count))
        return Message(reply.record(), reply_to=message)

    def tell_means(self, message: Message, context: Context) -> Message:
        """The sum of all features, from which the sites' common centre is made."""
        request = MeansRequest.read(message.content)

        def work(session: Session) -> MeansReply:
            images, total = session.sum_all_features()
            return MeansReply(images=images, total=total)

        return self._tell_solved(message, context, request.study, "means", work)

    def tell_sums(self, message: Message, context: Context) -> Message:
        """The sums of features by class from which a head is solved."""
        study_id = get_value(message.content, CONFIG, STUDY, str)

        def work(session: Session) -> SumsReply:
            request = SumsRequest.read(message.content, session.prepared.network.width)
            if len(request.weights) != len(session.prepared.study.classes):
                raise ContractError("weights of other classes than the study has")
            return SumsReply(sums=session.sum_features(request.weights, request.centre))

        return self._tell_solved(message, context, study_id, "sums", work)

    def tell_noised(self, kind: TrainingRelease, message: Message, context: Context) -> Message:
        """A noised sum over training patients, for a private head."""
        request = NoisedRequest.read(message.content)
        site, study = self._find_study(context, request.study)
        opened = self._runtime.open_site(site)
        what = Release(study=study.id, name=study.name, kind=kind)
        session, agreed = self._open_joined(context, opened, what)
        if study.directions is None or agreed.privacy_plan is None:
            raise ContractError("noised sums of a study or a site that has none")
        network = session.prepared.network
        shapes = {name: network.shapes[name] for name in network.found}
        whitening = from_arrays(request.arrays, shapes)
        received = network.digest({**network.initial, **whitening})
        privacy = agreed.privacy_plan.find(kind).release
        what = what.model_copy(update={"received": received, "privacy": privacy})
        with record_errors(opened.ledger, what):
            return _leave(
                message,
                opened,
                what,
                lambda: session.tell_noised(kind, whitening),
                allow=lambda: session.allow(opened.ledger.spending, whitening, kind),
            )

    def compare_heads(self, message: Message, context: Context) -> Message:
        """How several solved heads do on validation images."""
        request = CandidatesRequest.read(message.content)

        def work(session: Session) -> CandidatesReply:
            prepared = session.prepared
            heads, centre = request.heads(len(prepared.study.classes), prepared.network.width)
            return CandidatesReply(counts=session.compare_heads(heads, centre))

        return self._tell_solved(message, context, request.study, "candidates", work)

    def validate(self, message: Message, context: Context) -> Message:
        """How one model does on validation images, and how true its probabilities are."""
        request = ValidateRequest.read(message.content)

        def work(session: Session) -> ValidateReply:
            check_read_outs(request.read_outs, len(session.prepared.study.classes))
            tensors = from_arrays(request.arrays, session.prepared.network.shapes)
            return session.validate(tensors, request.read_outs)

        return self._tell_once(message, context, request.study, "validate", work)

    def _tell_solved(
        self,
        message: Message,
        context: Context,
        study_id: str,
        kind: Literal["means", "sums", "candidates"],
        work: Callable[[Session], Answer],
    ) -> Message:
        """What a site that trains answers in a study whose head is solved."""
        _, study = self._find_study(context, study_id)
        if study.model.solved_head is None or study.private:
            raise ContractError("a study whose head is not solved from exact sums")
        return self._tell_once(message, context, study_id, kind, work)

    def _tell_once(
        self,
        message: Message,
        context: Context,
        study_id: str,
        kind: Literal["means", "sums", "candidates", "validate"],
        work: Callable[[Session], Answer],
    ) -> Message:
        """What a site that trains answers to one question, always the same to the same."""
        site, study = self._find_study(context, study_id)
        opened = self._runtime.open_site(site)
        received = hash_request(message.content)
        what = Release(study=study.id, name=study.name, kind=kind, received=received)
        session, agreed = self._open_joined(context, opened, what)
        if agreed.role != "train":
            raise ContractError("a question to a site that does not train")
        if kind in ("means", "sums") and agreed.disclosure.sums == "none":
            raise ContractError("sums that this site agreed not to tell")
        if kind == "sums" and opened.ledger.models(study.id, kind) - {received}:
            # From two sums with other centres or weights, every image can be told.
            raise ContractError("sums with another centre or other weights than the first")
        with record_errors(opened.ledger, what):
            return _leave(message, opened, what, lambda: work(session))

    def work_round(self, message: Message, context: Context) -> Message:
        """One round: evaluate what came on validation patients, then train it and send it back."""
        request = RoundRequest.read(message.content)
        site, study = self._find_study(context, request.study)
        if request.round > study.train.rounds:
            raise ContractError(f"round {request.round} of a study of {study.train.rounds}")
        opened = self._runtime.open_site(site)
        what = Release(study=study.id, name=study.name, kind="round", round=request.round)
        session, agreed = self._open_joined(context, opened, what)
        tensors = from_arrays(request.arrays, session.prepared.network.shapes)
        privacy = agreed.privacy_plan.round if agreed.privacy_plan else None
        what = what.model_copy(
            update={"received": session.prepared.network.digest(tensors), "privacy": privacy}
        )
        with record_errors(opened.ledger, what):
            return _leave(
                message,
                opened,
                what,
                lambda: session.work(request, tensors, opened.ledger.head),
                allow=lambda: session.allow(opened.ledger.spending, tensors),
            )

    def finish(self, message: Message, context: Context) -> Message:
        """The final message: counts of the released model."""
        request = FinalRequest.read(message.content)
        site, study = self._find_study(context, request.study)
        check_read_outs([request.read_out], len(study.classes))
        opened = self._runtime.open_site(site)
        what = Release(study=study.id, name=study.name, kind="final")
        session, agreed = self._open_joined(context, opened, what)
        network = session.prepared.network
        released = from_arrays(request.arrays, network.shapes)
        solved = None
        if request.solved is not None:
            sums = request.solved.sums(len(study.classes), network.width)
            solved = sums, request.solved.shrinkage
        received = network.digest(released)
        rounds, ends = (opened.ledger.models(study.id, kind) for kind in ("round", "final"))
        if request.solved or request.read_out != AS_IT_IS:
            # What is told depends on these, too, and no round told it.
            beside = [request.solved.digest if request.solved else "", request.read_out.facts()]
            received = hashlib.sha256(json.dumps([received, *beside]).encode()).hexdigest()
        given = opened.ledger.models(study.id, "sums", "prototypes")
        if request.solved is not None and not opened.ledger.models(study.id, "sums"):
            raise ContractError("sums of all sites to one that told none")
        check_end(study, agreed, received, rounds=rounds, took_part=bool(rounds | given), ends=ends)
        what = what.model_copy(update={"received": received, "privacy": agreed.end})
        with record_errors(opened.ledger, what):
            return _leave(
                message,
                opened,
                what,
                lambda: finish(session, KeptModel(released, request.read_out), solved),
                allow=lambda: check_noise_once(opened.ledger.sealed_ends(study.id), study),
            )

    def _open_joined(
        self, context: Context, opened: SiteRuntime, what: Release
    ) -> tuple[Session, Agreement]:
        """The session of a study that was joined, and what was agreed; an error has its line."""
        with record_errors(opened.ledger, what):
            session = self._runtime.open_session(find_site_file(context), what.study)
            return session, session.agreed()

    def _find_study(self, context: Context, study_id: str) -> tuple[Site, Study]:
        """The site this app runs in, and a study that it was sent."""
        site = Site.read(find_site_file(context))
        return site, read_proposal(site, study_id)


def _leave(
    message: Message,
    opened: SiteRuntime,
    what: Release,
    work: Callable[[], Answer],
    allow: Callable[[], None] = lambda: None,
) -> Message:
    """The only way out: what leaves is parsed from the very bytes that were recorded."""
    data = release(opened.ledger, opened.outbox, what, lambda: _reply(work()), allow)
    return Message(record_from_bytes(data), reply_to=message)


def hash_request(record: RecordDict) -> str:
    """The SHA-256 of what was asked."""
    return hashlib.sha256(record_to_bytes(record)).hexdigest()


def _reply(answer: Answer) -> Reply:
    record = answer.record()
    arrays = [item for found in record.array_records.values() for item in found.items()]
    tensors = {name: tuple(array.shape) for name, array in arrays}
    return Reply(record_to_bytes(record), tensors, tuple(_figures(answer, record)))


def _figures(answer: Answer, record: RecordDict) -> Iterator[str]:
    """Names of all that leaves beside tensors."""
    if isinstance(answer, JoinReply):
        for name, value in answer.model_dump(exclude_none=True).items():
            yield from (f"{name}.{part}" for part in value) if isinstance(value, dict) else [name]
    for part, metrics in record.metric_records.items():
        yield from (f"{part}.{name}" for name, told in metrics.items() if told not in ([], 0.0))


def find_site_file(context: Context) -> Path:
    """The site file of the hospital this app runs in, from the node's own configuration."""
    path = context.node_config.get("site")
    if not isinstance(path, str):
        raise SiteError("node configuration: expected site=<path of site.yaml>, got nothing")
    return Path(path)


app = make_app(Runtime(bound=True))
"""For Flower's own commands, which load an app by its name."""
