"""The hospital's node: asks for messages, has this installation's own app answer, sends replies.

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
from client.link.fleet_client import HEARTBEAT, Envelope, Fleet, OverError
from client.link.limits import MessageLimits
from client.link.pending import PendingMessage
from client.runtime import Runtime
from client.site import Site
from common.config.study import Study
from common.errors import ConsiliumError, ContractError, LinkError
from common.flower.compat import VERSION, is_same_version
from common.flower.messages import make_error_reply
from common.protocol.backbone import BACKBONE
from common.protocol.join import JoinRequest
from common.protocol.ledger import LEDGER
from common.protocol.round import RoundRequest
from common.support import files

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
}
_KEPT = "what was answered before"


class Node:
    """One site's presence at its coordinator.

    Args:
      site_file: Of the site.
      stop: Ends `serve`; a message that is being answered is answered first.

    Raises:
      ConsiliumError: the site file, key, certificate or ledger is wrong, or another process of this
        site is at work.
    """

    def __init__(self, site_file: Path, stop: threading.Event) -> None:
        site = Site.read(site_file)
        self._fleet = Fleet.from_site(site)
        runtime = Runtime(bound=True)
        runtime.open_site(site)  # keeps every other process out as long as this one lives
        self._app = make_app(runtime)
        self._config = {"site": str(site_file.resolve())}
        self._folder, self._stop = site.private("link"), stop
        self._pending = PendingMessage(self._folder)
        self._runtime, self._limits = runtime, MessageLimits(self._folder / "sizes")
        self._number: int | None = self._remembered()
        self._trouble: str | None = "not connected yet"
        self._last: Envelope | None = None
        self._study, self._doing = "", _KEPT

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

        threading.Thread(target=send_heartbeats, daemon=True).start()
        try:
            yield
        finally:
            done.set()

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
            log.warning("%s. It tries again every %.0f s.", trouble.rstrip("."), _AGAIN)
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
            context = Context(envelope.run, self._number or 0, dict(self._config), RecordDict(), {})
            reply = self._app(message, context)
            self._limits.expect(self._runtime.list_shapes())
            return reply
        except LinkError:
            raise
        except ContractError as ex:
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
