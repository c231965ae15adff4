"""A page in headless Chromium, looked at and used as a person would: hover, choose, print.

with Browser(tmp_path / "report.html") as page:
    page.text("#shown")                                  # "12 shown"
    page.choose("#source", "ocr")                        # in a menu
    page.move(300, 400)                                  # the pointer, to a place in the window
    page.evaluate("document.title")                      # any JavaScript
    page.screenshot(tmp_path / "page.png")
    assert not page.errors and not page.requests

It speaks the protocol of Chrome's own developer tools, over two pipes.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-pipe", "--hide-scrollbars"),
]


class Browser:
    """A browser that shows one page of files; skips the test where there is no browser."""

    def __init__(self, page: Path, width: int = 1280, height: int = 900) -> None:
        if CHROMIUM is None:
            pytest.skip("needs a browser: apt-get install chromium")
        self.errors: list[str] = []
        """Of the page's scripts, and what it wrote to the console as an error or warning."""
        self.requests: list[str] = []
        """Addresses that the page asked for, apart from its own and data URIs."""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads commands from its file 3 and answers in its file 4.
        command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", CHROMIUM, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self._events: list[str] = []
        (target,) = [
            target for target in self._call("Target.getTargets")["targetInfos"] if target["type"] == "page"
        ]
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self.resize(width, height)
        self._call("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._read()
        self._address = page.resolve().as_uri()
        # Two frames later everything is drawn.
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        """The next message, after noting what it tells about errors and requests."""
        while b"\0" not in self._buffer:
            received = os.read(self._in, 1 << 20)
            assert received, "the browser ended"
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        method, told = message.get("method"), message.get("params", {})
        if method:
            self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:2000])
        if method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(told["args"])[:2000])
        if method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        if method == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if told["type"] != "Document" and not address.startswith(("data:", "blob:")):
                self.requests.append(address)
        return message

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, or of its promise."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self._call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """What a person reads in the first element that fits: nothing that is hidden."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def box(self, selector: str) -> tuple[float, float, float]:
        """Scroll to the first element that fits, and return its left, top and width in the window."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView()")
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        left, top, width = self.evaluate(f"(box => [box.left, box.top, box.width])({box})")
        return left, top, width

    def choose(self, selector: str, value: str) -> None:
        """Choose a value of a menu."""
        self.evaluate(
            f"(menu => {{ menu.value = {json.dumps(value)}; menu.dispatchEvent(new Event('change')); }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the window, or of the whole page."""
        data = self._call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(data["data"]))

    def print(self, path: Path) -> None:
        """A PDF, as the browser prints the page."""
        data = self._call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(data["data"]))
