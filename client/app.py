"""The hospital's Flower ClientApp: parse, agree, work, reply. The error boundary."""

import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.session import Session, open_session, remember
from client.site import Site
from common import wire
from common.errors import ConsiliumError, SiteError
from common.flower import ClientAppCallable, error_reply

log = logging.getLogger(__name__)


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
    study = remember(Site.read(site_file(context)), request.proposal)
    reply = _session(context, study.id).joined()
    return Message(reply.record(), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """One round: evaluate what came on validation patients, then train it and send it back."""
    request = wire.RoundRequest.read(message.content)
    session = _session(context, request.study)
    tensors = wire.from_arrays(request.arrays, session.network.shapes)
    counts = session.evaluate(tensors, "validation")
    train_loss = session.train(tensors, request.round, request.proximal_mu)
    reply = wire.RoundReply(
        arrays=wire.to_arrays(session.network.tensors),
        train_loss=train_loss,
        counts=counts,
    )
    return Message(reply.record(), reply_to=message)


@app.evaluate()
def finish(message: Message, context: Context) -> Message:
    """The final message: counts of the last model and of the best."""
    request = wire.FinalRequest.read(message.content)
    session = _session(context, request.study)
    last = wire.from_arrays(request.last, session.network.shapes)
    best = wire.from_arrays(request.best, session.network.shapes)
    reply = wire.FinalReply(
        validation_last=session.evaluate(last, "validation"),
        test_last=session.evaluate(last, "test"),
        test_best=session.evaluate(best, "test"),
    )
    return Message(reply.record(), reply_to=message)


def site_file(context: Context) -> Path:
    """The site file of the hospital this app runs in, from the node's own configuration."""
    path = context.node_config.get("site")
    if not isinstance(path, str):
        raise SiteError("node configuration: expected site=<path of site.yaml>, got nothing")
    return Path(path)


def _session(context: Context, study: str) -> Session:
    return open_session(site_file(context), study)
