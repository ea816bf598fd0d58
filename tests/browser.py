"""A headless Chromium over the DevTools protocol: open a page, ask it things, press keys."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage", "--mute-audio",
    "--remote-debugging-port=0", "--window-size=1400,1600",
    # no network: only addresses of this machine answer
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Page:
    """One page of a browser of its own; use it as a context manager.

    `requests` fills with the address of everything that the page asks for, `problems` with the errors that
    its scripts raise. Without a browser on this machine the test is skipped.
    """

    def __init__(self, folder: Path):
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            pytest.skip("no Chromium on this machine")
        self._folder, self._number, self.requests, self.problems = Path(folder) / "browser", 0, [], []
        command = [browser, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        from websocket import create_connection

        file = self._folder / "DevToolsActivePort"
        port = until(lambda: file.is_file() and file.read_text().split(), "the browser did not start")[0]
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
            [target] = [entry for entry in json.load(answer) if entry["type"] == "page"]
        self._socket = create_connection(target["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if its window were in front
        return self

    def __exit__(self, *error):
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def call(self, method: str, **parameters) -> dict:
        """Send a command and wait for its answer; events that come in between are noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(message["params"]["exceptionDetails"])

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def ask(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression: str):
        """Ask until the answer is true, and return it."""
        return until(lambda: self.ask(expression), expression)

    def press_right(self) -> None:
        """Press the right arrow key."""
        for kind in ("rawKeyDown", "keyUp"):
            key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
            self.call("Input.dispatchKeyEvent", type=kind, **key)


def until(condition, what: str):
    """Ask again and again until the answer is true; the test fails when that takes a minute."""
    end = time.monotonic() + 60
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.1)
    return answer
