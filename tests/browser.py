"""A headless Chromium over the DevTools protocol: open a page, ask it things, type and press keys."""

import json
import shutil
import subprocess
import time
from pathlib import Path

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
    its scripts raise.
    """

    def __init__(self, folder: Path):
        self._folder, self._number = Path(folder) / "browser", 0
        self.requests, self.problems = [], []
        command = [find(), *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._socket = None

    def __enter__(self):
        from urllib.request import urlopen

        from websocket import create_connection

        until(lambda: self._port_file.is_file() and self._port_file.read_text().strip(), 60)
        port = self._port_file.read_text().split()[0]
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
            [target] = [entry for entry in json.load(answer) if entry["type"] == "page"]
        self._socket = create_connection(target["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if its window were in front
        return self

    def __exit__(self, *error):
        if self._socket is not None:
            self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def _port_file(self) -> Path:
        return self._folder / "DevToolsActivePort"

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

    def wait(self, expression: str, seconds: float = 60):
        """Ask until the answer is true, and return it."""
        return until(lambda: self.ask(expression), seconds, lambda: expression)

    def focus(self, selector: str, index: int = 0) -> None:
        self.ask(f"document.querySelectorAll({json.dumps(selector)})[{index}].focus()")

    def type(self, text: str) -> None:
        """Type into what has the focus, in the place of what it holds."""
        self.ask("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, times: int = 1) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Tab": 9}
        for kind in ("rawKeyDown", "keyUp") * times:
            about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.call("Input.dispatchKeyEvent", type=kind, **about)


def find() -> str:
    """The browser's program; without one the test is skipped."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    return browser


def until(condition, seconds: float, what=lambda: "the browser did not start"):
    """Ask again and again until the answer is true; the test fails when that takes too long."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s in vain: {what()}")
        time.sleep(0.1)
    return answer
