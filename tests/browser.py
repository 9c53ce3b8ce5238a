"""Headless Chromium: one picture or text of a page, or a page used as a person does, over Chromium's debugging pipe."""

import json
import os
import shutil
import subprocess
import time

import pytest

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
).split()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def chromium(page, profile, *flags):
    return subprocess.run(
        [BROWSER, *QUIET, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


class Tab:
    """One page in a Chromium that reaches this machine alone; `requests` are the addresses that the page asked for."""

    def __init__(self, profile, url, *flags):
        to_browser, self.commands = os.pipe()
        self.replies, from_browser = os.pipe()
        local = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        command = [BROWSER, *QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe", local, *flags]
        # Chromium reads commands from file 3 and writes replies to file 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command]
        self.process = subprocess.Popen(shell, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.unread, self.session, self.requests, self.complaints = 0, b"", {}, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self.commands)  # which ends Chromium
        self.process.wait(timeout=30)
        os.close(self.replies)

    def call(self, method, **parameters):
        """The result of a command of the DevTools protocol; what happened meanwhile is noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.unread:
                more = os.read(self.replies, 1 << 20)
                assert more, "Chromium has gone"
                self.unread += more
            text, self.unread = self.unread.split(b"\0", 1)
            said = json.loads(text)
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]
            if said.get("method") == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            elif said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(said["params"])

    def value(self, expression):
        """What a JavaScript expression is in the page."""
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def wait_for(self, expression, seconds=60):
        """Wait until a JavaScript expression is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression}: not in {seconds} s; {self.value('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def click(self, element, times=1):
        """Press the mouse in the middle of an element, given in JavaScript."""
        self.wait_for(f"!!{element}")
        x, y = self.value(
            f"(e => {{ e.scrollIntoView(); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2] }})({element})"
        )
        for n in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=n)

    def type_over(self, element, text):
        """Replace the text of a field, given in JavaScript."""
        self.click(element, times=3)
        self.call("Input.insertText", text=text)
