"""A headless Chromium that is spoken to through its pipe: the DevTools protocol, nothing between.

Protocol: https://chromedevtools.github.io/devtools-protocol/; with `--remote-debugging-pipe` the
browser reads JSON from descriptor 3 and writes it to descriptor 4, each message ended by a NUL.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 60.0

_LAUNCH = (
    "import os, sys\n"
    "os.dup2(int(sys.argv[1]), 3)\nos.dup2(int(sys.argv[2]), 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


def find_chromium() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One page in a browser of its own; `events` has what the browser has told so far."""

    def __init__(self, executable: str, profile: Path) -> None:
        (to_child, self._write), (self._read, from_child) = os.pipe(), os.pipe()
        given = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (to_child, from_child)]
        command = [executable, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with (profile.parent / f"{profile.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, *map(str, given), *command],
                pass_fds=given,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(profile.parent)},
            )
        for one in (to_child, from_child, *given):
            os.close(one)
        self.events: list[dict[str, Any]] = []
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Ends the browser and waits for it."""
        self._session = None
        self.call("Browser.close")
        self._process.wait(timeout=PATIENCE_S)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def visit(
        self, address: str, width: int, dark: bool, height: int = 900, media: str = "screen"
    ) -> None:
        """Loads a page, `width` CSS pixels wide, for a screen or for print."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=address)
        while not any(one.get("method") == "Page.loadEventFired" for one in self.events):
            self.events.append(self._next())
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of its promise."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def requests(self) -> list[str]:
        """The addresses that the page has asked for; data: is none."""
        return [
            one["params"]["request"]["url"]
            for one in self.events
            if one.get("method") == "Network.requestWillBeSent"
            and not one["params"]["request"]["url"].startswith("data:")
        ]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, of the browser's log and of scripts."""
        found = []
        for one in self.events:
            method, said = one.get("method"), one.get("params", {})
            if method == "Log.entryAdded" and said["entry"]["level"] in {"error", "warning"}:
                found.append(said["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and said["type"] in {"error", "warning"}:
                found.append(str(said["args"]))
            elif method == "Runtime.exceptionThrown":
                found.append(said["exceptionDetails"]["text"])
        return found

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
            assert ready, "Chromium does not answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "Chromium has ended"
            self._rest += chunk
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)
