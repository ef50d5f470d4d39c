"""The hospital's Flower ClientApp: parse, agree, work, record, reply. The error boundary."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.consent.proposals import drop, proposed, remember
from client.ledger.desk import Desk, open_desk
from client.ledger.entries import Release
from client.ledger.release import Reply, release
from client.session import Session, open_session
from client.site import Site
from client.weights import receive
from common.errors import (
    ConsiliumError,
    ContractError,
    DataError,
    MissingWeightsError,
    RefusedError,
    SiteError,
)
from common.flower.compat import ClientAppCallable, error_reply, from_bytes, to_bytes
from common.model.contract import digest
from common.protocol import wire

log = logging.getLogger(__name__)

Answer = wire.JoinReply | wire.RoundReply | wire.FinalReply


def boundary(message: Message, context: Context, work: ClientAppCallable) -> Message:
    """Answer any failure with its public code; the text stays in this site's log."""
    try:
        return work(message, context)
    except ConsiliumError as ex:
        log.error("%s: %s", context.node_config.get("site"), ex)
        return error_reply(message, ex.code)
    except Exception:
        log.exception("an error nobody foresaw")
        return error_reply(message, ConsiliumError.code)


app = ClientApp(mods=[boundary])


@app.query()
def join(message: Message, context: Context) -> Message:
    """Read the proposal, agree or refuse, prepare every image."""
    request = wire.JoinRequest.read(message.content)
    site = Site.read(site_file(context))
    desk = open_desk(site)
    study = remember(site, request.proposal)
    for ended in desk.ledger.ends.keys() - {study.id}:
        desk.outbox.purge(ended)
    what = Release(study=study.id, name=study.name, kind="join")
    try:
        session = open_session(site_file(context), study.id)
    except MissingWeightsError as ex:
        log.info("%s", ex)
        return Message(wire.lacking(), reply_to=message)
    except (RefusedError, DataError) as ex:  # a bit about the patients, where they decided
        desk.ledger.send(what, Reply(ex.code.encode(), {}, (ex.code,)).contents)
        drop(site, study)
        raise
    return _leave(message, session, what, lambda: session.joined(_head(desk), desk.ledger.spending))


@app.query("backbone")
def backbone(message: Message, context: Context) -> Message:
    """A piece of the backbone, for a site that said it has no copy; nothing of a patient leaves."""
    part = wire.BackbonePart.read(message.content)
    site = Site.read(site_file(context))
    held = receive(site, proposed(site, part.study), part)
    return Message(wire.BackboneHeld(held).record(), reply_to=message)


@app.query("ledger")
def ledger(message: Message, context: Context) -> Message:
    """The hash of one line of this site's ledger; of no patient, and so not a line itself."""
    request = wire.LedgerRequest.read(message.content)
    desk = open_desk(Site.read(site_file(context)))
    reply = wire.LedgerReply(desk.ledger.hash_at(request.count))
    return Message(reply.record(), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """One round: evaluate what came on validation patients, then train it and send it back."""
    request = wire.RoundRequest.read(message.content)
    session = open_session(site_file(context), request.study)
    study = session.study
    if request.round > study.train.rounds:
        raise ContractError(f"round {request.round} of a study of {study.train.rounds}")
    tensors = wire.from_arrays(request.arrays, session.network.shapes)
    protection = session.agreed().protection
    what = Release(
        study=study.id,
        name=study.name,
        kind="round",
        round=request.round,
        received=digest(tensors),
        privacy=protection.round if protection else None,
    )
    desk = open_desk(session.site)
    return _leave(
        message,
        session,
        what,
        lambda: session.work(request, tensors, _head(desk)),
        allow=lambda: session.allow(desk.ledger.spending, tensors),
    )


@app.evaluate()
def finish(message: Message, context: Context) -> Message:
    """The final message: counts of the released model."""
    request = wire.FinalRequest.read(message.content)
    session = open_session(site_file(context), request.study)
    released = wire.from_arrays(request.arrays, session.network.shapes)
    study, received = session.study, digest(released)
    _ends_once(session, received)
    what = Release(study=study.id, name=study.name, kind="final", received=received)
    return _leave(message, session, what, lambda: session.finish(released))


def _head(desk: Desk) -> wire.LedgerHead:
    return wire.LedgerHead(count=desk.ledger.head.count, hash=desk.ledger.head.hash)


def _ends_once(session: Session, received: str) -> None:
    """Where figures are told at the end only, a server cannot have every round be the end."""
    if session.agreed().disclosure.metrics == "every_round":
        return
    ends = open_desk(session.site).ledger.ends.get(session.study.id, frozenset())
    if ends - {received}:
        where, expected = f"study {session.study.name}", "the model that it ended with before"
        remedy = "Run it again under another name or seed."
        raise ContractError(where, expected=expected, got="another", remedy=remedy)


def _leave(
    message: Message,
    session: Session,
    what: Release,
    work: Callable[[], Answer],
    allow: Callable[[], None] = lambda: None,
) -> Message:
    """The only way out: what leaves is parsed from the very bytes that were recorded."""
    desk = open_desk(session.site)
    data = release(desk.ledger, desk.outbox, what, lambda: _reply(work()), allow)
    return Message(from_bytes(data), reply_to=message)


def _reply(answer: Answer) -> Reply:
    record = answer.record()
    arrays = [item for found in record.array_records.values() for item in found.items()]
    tensors = {name: tuple(array.shape) for name, array in arrays}
    return Reply(to_bytes(record), tensors, tuple(_figures(answer, record)))


def _figures(answer: Answer, record: RecordDict) -> Iterator[str]:
    """Names of all that leaves beside tensors."""
    if isinstance(answer, wire.JoinReply):
        for name, value in answer.model_dump(exclude_none=True).items():
            yield from (f"{name}.{part}" for part in value) if isinstance(value, dict) else [name]
    for part, metrics in record.metric_records.items():
        yield from (f"{part}.{name}" for name, told in metrics.items() if told != [])


def site_file(context: Context) -> Path:
    """The site file of the hospital this app runs in, from the node's own configuration."""
    path = context.node_config.get("site")
    if not isinstance(path, str):
        raise SiteError("node configuration: expected site=<path of site.yaml>, got nothing")
    return Path(path)
