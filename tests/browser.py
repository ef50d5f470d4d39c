"""A page as a browser shows it: Chromium without a window, driven by the DevTools protocol.

The ways in are `open_page` and `print_page`. A test of them skips where there is no Chromium.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

# Chromium reads commands from descriptor 3 and writes to 4: these are put there, then it starts.
_START = "import os, sys; os.dup2({0}, 3); os.dup2({1}, 4); os.execv(sys.argv[1], sys.argv[1:])"
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_EVENTS = ("Page", "Network", "Log", "Runtime")


@dataclass(frozen=True)
class Seen:
    """What a browser makes of a page.

    Attributes:
      errors: What it complains of: errors and warnings, of its content policy, too.
      requests: What the page asks for beside itself, whether it gets it or not.
      overflow: Pixels by which the page is wider than its window.
      picture: The window as a PNG.
    """

    errors: list[str]
    requests: list[str]
    overflow: int
    picture: bytes


def open_page(path: Path, width: int, *, dark: bool = False) -> Seen:
    """Open a page in a window of `width` pixels, in a dark scheme or a light one."""
    with _open_tab() as tab:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setDeviceMetricsOverride", **screen)
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.load(path)
        wide = "document.scrollingElement.scrollWidth - window.innerWidth"
        overflow = tab.call("Runtime.evaluate", expression=wide)["result"]["value"]
        picture = base64.b64decode(tab.call("Page.captureScreenshot")["data"])
        return Seen(tab.list_errors(), tab.list_requests(path), int(overflow), picture)


def print_page(path: Path) -> bytes:
    """Print a page to PDF."""
    with _open_tab() as tab:
        tab.load(path)
        return base64.b64decode(tab.call("Page.printToPDF", preferCSSPageSize=True)["data"])


@dataclass
class _Tab:
    """A tab of the browser: commands out, answers and events back, each ended by a zero byte."""

    commands: int
    answers: int
    session: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    unread: bytes = b""
    calls: int = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.calls:
            self.events.append(answer)
        assert "result" in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def load(self, path: Path) -> None:
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self._find("Page.loadEventFired"):
            self.events.append(self._read())

    def list_errors(self) -> list[str]:
        entries = [event["entry"] for event in self._find("Log.entryAdded")]
        logged = [entry["text"] for entry in entries if entry["level"] in ("error", "warning")]
        said = [str(event["args"]) for event in self._find("Runtime.consoleAPICalled")]
        thrown = [str(event["exceptionDetails"]) for event in self._find("Runtime.exceptionThrown")]
        return logged + said + thrown

    def list_requests(self, page: Path) -> list[str]:
        asked = [event["request"]["url"] for event in self._find("Network.requestWillBeSent")]
        own = page.absolute().as_uri()
        return [url for url in asked if url != own and not url.startswith("data:")]

    def _find(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser ended"
            self.unread += more
        message, _, self.unread = self.unread.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextmanager
def _open_tab() -> Iterator[_Tab]:
    with _start_browser() as (commands, answers):
        tab = _Tab(commands, answers)
        target = tab.call("Target.createTarget", url="about:blank")
        found = tab.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab.session = found["sessionId"]
        for events in _EVENTS:
            tab.call(f"{events}.enable")
        yield tab


@contextmanager
def _start_browser() -> Iterator[tuple[int, int]]:
    """A browser, by the pipes that take commands and give answers."""
    (inlet, commands), (answers, outlet) = os.pipe(), os.pipe()
    start = [sys.executable, "-c", _START.format(inlet, outlet), _find_browser()]
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [*start, *_OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(inlet, outlet),
            stderr=subprocess.DEVNULL,
        )
        os.close(inlet)
        os.close(outlet)
        try:
            yield commands, answers
        finally:
            os.close(commands)
            os.close(answers)
            browser.terminate()
            browser.wait(timeout=20)


def _find_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    return found
