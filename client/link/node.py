"""The hospital's node: asks for messages, has this installation's own app answer, sends replies.

It serves every coordinator that the site file names. The app answers them one after the other.

One process that stays: what a study has loaded is there in the next round. No code comes over the
connection. Whatever breaks it, the node connects again and continues with the message at hand: a
lost connection, a restarted coordinator and a killed node are all the same to it.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from client.app import make_app
from client.link import tls
from client.link.fleet_client import HEARTBEAT, Envelope, Fleet, OverError
from client.link.limits import MessageLimits
from client.link.owners import StudyOwners
from client.link.pending import PendingMessage
from client.runtime import Runtime
from client.site import Connect, Site
from common.config.study import Study
from common.errors import ConsiliumError, ContractError, LinkError, RefusedError, WaitingError
from common.flower.compat import VERSION, is_same_version
from common.flower.messages import make_error_reply
from common.protocol.backbone import BACKBONE
from common.protocol.fields import CONFIG, STUDY, get_value
from common.protocol.join import JoinRequest
from common.protocol.ledger import LEDGER
from common.protocol.noised import MOMENTS, PROTOTYPES
from common.protocol.round import RoundRequest
from common.protocol.sums import CANDIDATES, MEANS, SUMS
from common.protocol.validate import VALIDATE
from common.support import files, keys

log = logging.getLogger(__name__)

_BUSY, _IDLE = 0.2, 2.0
"""Seconds between questions for a message: while a study runs, and otherwise."""
_RUNS = 300.0
"""Seconds after a message in which another is expected."""
_AGAIN = 5.0
"""Seconds before the next attempt to reach a coordinator that did not answer."""
_OFTEN = 0.6
"""Heartbeats in each stretch that one is good for, inverted."""

_NAMES = {
    "query": "the proposal",
    "evaluate": "the released model",
    LEDGER: "a line of the ledger",
    BACKBONE: "a piece of the backbone",
    MEANS: "the sum of all features",
    SUMS: "sums of features by class",
    CANDIDATES: "heads to compare",
    MOMENTS: "the spread of features, with noise",
    PROTOTYPES: "features by class, with noise",
    VALIDATE: "a model to validate",
}
_KEPT = "what was answered before"


class Node:
    """A site's presence at all of its coordinators, on one ledger.

    Args:
      site_file: Of the site.
      stop: Ends `serve`; messages that are being answered are answered first.

    Raises:
      ConsiliumError: the site file, a key, certificate or the ledger is wrong, or another process
        of this site is at work.
    """

    def __init__(self, site_file: Path, stop: threading.Event) -> None:
        site = Site.read(site_file)
        connections, app = site.list_connections(), SiteApp(site_file)
        self._presences = [_Presence(site, connect, app, stop) for connect in connections]
        self._stop = stop

    def serve(self) -> None:
        """Answer messages until told to stop, whatever the network does."""
        failures: list[Exception] = []

        def serve(presence: "_Presence") -> None:
            try:
                presence.serve()
            except Exception as ex:
                failures.append(ex)
                self._stop.set()

        first, *others = self._presences
        threads = [threading.Thread(target=serve, args=(one,), daemon=True) for one in others]
        for thread in threads:
            thread.start()
        serve(first)
        for thread in threads:
            thread.join()
        for failure in failures:
            raise failure


class SiteApp:
    """This installation's own app, at one site: it answers one message at a time, for whoever asks.

    Args:
      site_file: Of the site.

    Raises:
      SiteError: the ledger is wrong, or another process of this site is at work.
    """

    def __init__(self, site_file: Path) -> None:
        site = Site.read(site_file)
        self._runtime = Runtime(bound=True)
        self._runtime.open_site(site)  # keeps every other process out as long as this one lives
        self._app = make_app(self._runtime)
        self._config = {"site": str(site_file.resolve())}
        self._owners = StudyOwners(site.private("link") / "studies.json")
        self._turn = threading.Lock()

    def answer(
        self, message: Message, run: int, node: int, coordinator: str, limits: MessageLimits
    ) -> Message:
        """What leaves for a message, once it is its turn.

        Args:
          message: As it came.
          run: Flower's number of the run it is of.
          node: The number of this site at that coordinator.
          coordinator: The fingerprint of its authority.
          limits: Of its messages; they grow by what a study that was joined needs.
        """
        if (kind := message.metadata.message_type) not in {"train", *_NAMES}:
            raise ContractError(f"a message of type {kind!r}")  # Flower knows two names of each
        with self._turn:
            study = _name_study(message)
            self._owners.check_owner(study, coordinator)
            context = Context(run, node, dict(self._config), RecordDict(), {})
            reply = self._app(message, context)
            waits = reply.has_error() and reply.error.reason == WaitingError.code
            if kind == "query" and (waits or not reply.has_error()):
                self._owners.keep_owner(study, coordinator)
            limits.expect(self._runtime.list_shapes())
            return reply

    def write_page(self, study: str) -> None:
        """Write this hospital's own page of a study that has ended; what fails, the log says."""
        from client.reports.page import write_page  # what draws it is slow to import

        with self._turn:
            try:
                site_file = Path(self._config["site"])
                path = write_page(self._runtime.open_session(site_file, study))
            except Exception as ex:  # the study's answer has left, and no page is worth a node
                log.warning("no page of study %s was written: %s", study, ex)
            else:
                log.info("this hospital's own page of the study: %s", path)


class _Presence:
    """A site's presence at one coordinator."""

    def __init__(self, site: Site, connect: Connect, app: SiteApp, stop: threading.Event) -> None:
        self._fleet = Fleet.open(site, connect)
        self._app, self._stop = app, stop
        self._coordinator = keys.fingerprint(tls.read_authority(connect.ca))
        self._folder = site.find_link_folder(connect)
        self._pending = PendingMessage(self._folder)
        self._limits = MessageLimits(self._folder / "sizes")
        self._number: int | None = self._remembered()
        self._trouble: str | None = "not connected yet"
        self._last: Envelope | None = None
        self._study, self._doing = "", _KEPT
        self._ended: str | None = None

    def _remembered(self) -> int | None:
        path = self._folder / "number"
        text = path.read_text("ascii") if path.is_file() else ""
        return int(text) if text.isdigit() else None

    def serve(self) -> None:
        """Answer messages until told to stop, whatever the network does."""
        with self._alive():
            while not self._stop.is_set():
                try:
                    self._activate()
                    self._attend()
                except LinkError as ex:
                    self._say(str(ex))
                    self._stop.wait(_AGAIN)
            if self._trouble is None:
                with suppress(LinkError):
                    self._deactivate()
        self._fleet.close()

    def _deactivate(self) -> None:
        """Go, once the last reply is taken: one of a site that is gone is no longer asked for."""
        until = time.monotonic() + _AGAIN
        while self._last and time.monotonic() < until and not self._fleet.is_taken(self._last):
            time.sleep(_BUSY)
        self._fleet.deactivate()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Send heartbeats, also while the last message is being answered."""
        done = threading.Event()

        def send_heartbeats() -> None:
            while not done.wait(HEARTBEAT * _OFTEN):
                try:
                    if self._number is not None:
                        self._fleet.send_heartbeat()
                except LinkError:
                    pass  # whoever asks next says so
                except Exception:  # without heartbeats this site would count as gone
                    log.exception("no sign of life could be given")

        beating = threading.Thread(target=send_heartbeats, daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join()  # who hangs up must be the last to use the connection

    def _activate(self) -> None:
        """Come back under the number that this site had, which a killed node needs."""
        number = self._fleet.activate(self._number)
        if number != self._number:
            self._number = number
            with suppress(OSError):  # without it, a node that is killed waits half a minute
                files.write(self._folder / "number", str(number), mode=0o600)

    def _say(self, trouble: str) -> None:
        """Once, not at every attempt."""
        if trouble != self._trouble:
            stop = "" if trouble.endswith((".", "?")) else "."
            log.warning("%s%s It tries again every %.0f s.", trouble, stop, _AGAIN)
        self._trouble = trouble

    def _attend(self) -> None:
        """Answer one message after the other; raises `LinkError` when the connection breaks."""
        heard = -_RUNS
        while not self._stop.is_set():
            if (old := self._pending.envelope) and old.addressee != self._number:
                self._pending.drop()  # of a time before this site was admitted anew
            envelope = self._pending.envelope or self._fleet.pull_envelope()
            if envelope is None:
                self._connected()
                busy = time.monotonic() - heard < _RUNS
                self._stop.wait(_BUSY if busy else _IDLE)
                continue
            self._answer(envelope)
            self._connected()
            heard = time.monotonic()

    def _connected(self) -> None:
        if self._trouble is not None:
            log.info("connected to %s", self._fleet.server)
            self._trouble = None

    def _answer(self, envelope: Envelope) -> None:
        """Answer one message, unless nobody waits for the answer any more."""
        began, pending = time.monotonic(), self._pending
        if pending.envelope is None:
            pending.store_message(envelope)
        try:
            refusal = self._refusal(envelope)
            started = time.monotonic()
            reply = pending.reply or refusal or self._work(envelope)
            worked = time.monotonic() - started
            if reply is None:
                raise OverError("nobody waits for an answer")
            if pending.reply is None:
                pending.store_reply(reply)
            self._fleet.push_reply(envelope, reply)
            self._last = envelope
        except OverError as ex:
            log.info("the answer is dropped: %s", ex)
        else:
            whole = time.monotonic() - began
            log.info("%s answered in %.1f s, %.1f of it work", self._doing, whole, worked)
        self._doing = _KEPT
        pending.drop()
        if self._ended is not None:  # only now: nobody waits for it
            self._app.write_page(self._ended)
            self._ended = None

    def _refusal(self, envelope: Envelope) -> Message | None:
        """No to whatever another release asks for, before anything of it is fetched."""
        try:
            theirs = self._fleet.read_version(envelope)
            if not is_same_version(theirs):
                expected, got = f"release {VERSION}, as here", theirs or "none"
                remedy = "Both sides must install the same release."
                where = f"the coordinator at {self._fleet.server}"
                raise ContractError(where, expected=expected, got=got, remedy=remedy)
        except ContractError as ex:
            log.error("refused: %s", ex)
            return make_error_reply(envelope.empty, ex.code)
        return None

    def _work(self, envelope: Envelope) -> Message | None:
        """What this installation's own app answers; None if the message was withdrawn."""
        try:
            message = self._fleet.pull_message(envelope, self._limits.get(envelope.kind))
            if message is None:
                return None
            self._introduce(message)
            number = self._number or 0
            coordinator, limits = self._coordinator, self._limits
            reply = self._app.answer(message, envelope.run, number, coordinator, limits)
            if envelope.kind == "evaluate" and not reply.has_error():
                self._ended = _name_study(message)
            return reply
        except LinkError:
            raise
        except (ContractError, RefusedError) as ex:
            log.error("%s", ex)
            return make_error_reply(envelope.empty, ex.code)
        except Exception:  # the app answers every failure itself; this is what it cannot
            log.exception("the app failed")
            return make_error_reply(envelope.empty, ConsiliumError.code)

    def _introduce(self, message: Message) -> None:
        """Know what is asked, for the log."""
        kind, content = message.metadata.message_type, message.content
        what = _NAMES.get(kind, kind)
        with suppress(ConsiliumError, ValueError):  # the app says what is wrong with it
            if kind == "query":
                study = Study.model_validate_json(JoinRequest.read(content).proposal)
                log.info("study %s (%s) asks this site to join", study.name, study.id)
                self._study = f"study {study.name}: "
            elif kind == "train":
                what = f"round {RoundRequest.read(content).round}"
        self._doing = f"{self._study}{what}"


def _name_study(message: Message) -> str:
    """The id of the study that a message is about; empty if it is about none, or cannot be read."""
    content = message.content
    with suppress(ConsiliumError, ValueError):  # the app says what is wrong with it
        if message.metadata.message_type == "query":
            return Study.model_validate_json(JoinRequest.read(content).proposal).id
        return str(get_value(content, CONFIG, STUDY, str))
    return ""
