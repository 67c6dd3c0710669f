"""A page used by keys alone, in a real browser over its debugging protocol.

Notable:
- the page is the file as it is written: the protocol reads and presses from outside, past the rule
  by which a page forbids itself every script
- a Tab walks over what can be reached; what that should be is asked of the page's elements
"""

import asyncio
import json
import subprocess
from contextlib import asynccontextmanager, contextmanager

import aiohttp
from pages import CHROMIUM

KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39}
TEXT = {"Enter": "\r"}
PHONE = (360, 740)
# What keys must reach, in the order of the document; what a closed <details> hides is left out.
STOPS = """[...document.querySelectorAll("a[href], summary, button, input, [tabindex='0']")]
  .filter((element) => element.checkVisibility())"""
# Nothing is laid out in another order than it is written, and read, in.
READ_IN_ORDER = """[...document.querySelectorAll("body *")].every((element) => {
  const style = getComputedStyle(element);
  return style.order === "0" && style.float === "none" && !style.flexDirection.endsWith("reverse");
})"""
FOCUSED = """(() => {
  const element = document.activeElement, style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  return {
    place: STOPS.indexOf(element),
    what: element.outerHTML.slice(0, 80),
    outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
    visible: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
  };
})()""".replace("STOPS", STOPS)


class Page:
    """An open page.

    Args:
        socket: to its debugger.
    """

    def __init__(self, socket):
        self.socket, self.sent = socket, 0

    async def ask(self, method, **params):
        """Call a method of the protocol."""
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        while True:
            said = json.loads(await self.socket.receive_str(timeout=60))
            if said.get("id") == self.sent:
                assert "error" not in said, said
                return said["result"]

    async def value(self, expression):
        """What an expression is on the page."""
        found = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def press(self, key):
        """Push a key down and let it go."""
        names = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        down = {"type": "keyDown", "text": TEXT[key]} if key in TEXT else {"type": "rawKeyDown"}
        await self.ask("Input.dispatchKeyEvent", **names, **down)
        await self.ask("Input.dispatchKeyEvent", **names, type="keyUp")

    async def until(self, expression):
        """Wait for an expression to hold, e.g. for a scroll that takes some frames."""
        for _ in range(200):
            if await self.value(expression):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never came true: {expression}")


@contextmanager
def browser(profile):
    """A running browser; the port of its debugger."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += [f"--user-data-dir={profile}", f"--window-size={PHONE[0]},{PHONE[1]}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            said = next(line for line in running.stderr if line.startswith("DevTools listening"))
            yield int(said.partition("127.0.0.1:")[2].partition("/")[0])
        finally:
            running.terminate()


@asynccontextmanager
async def opened(page, port):
    """A page at the size of a phone, loaded."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = await answer.json()
        address = next(own["webSocketDebuggerUrl"] for own in targets if own["type"] == "page")
        async with session.ws_connect(address, max_msg_size=0) as socket:
            shown = Page(socket)
            width, height = PHONE
            await shown.ask(
                "Emulation.setDeviceMetricsOverride",
                **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
            )
            await shown.ask("Page.navigate", url=page.as_uri())
            await shown.until("location.protocol === 'file:' && document.readyState === 'complete'")
            yield shown


async def use(page, port):
    async with opened(page, port) as shown:
        await skip_to_the_main_part(shown)
        await open_details(shown)
        await scroll_what_is_too_wide(shown)
    async with opened(page, port) as shown:
        assert await shown.value(READ_IN_ORDER), "something is shown in another order"
        await walk(shown)


async def skip_to_the_main_part(shown):
    await shown.press("Tab")
    assert await shown.value("document.activeElement.className") == "skip"
    await shown.press("Enter")
    await shown.until("document.activeElement.id === 'main'")
    await shown.press("Tab")
    assert await shown.value("document.getElementById('main').contains(document.activeElement)"), (
        "the first Tab after the skip link leaves the main part"
    )


async def open_details(shown):
    """The first <details>, where there is one."""
    if not await shown.value("document.querySelector('summary') !== null"):
        return
    await shown.value("document.querySelector('summary').focus()")
    await shown.press("Enter")
    await shown.until("document.querySelector('details').open")


async def scroll_what_is_too_wide(shown):
    """The first region that has more to scroll to, where there is one."""
    wide = """[...document.querySelectorAll("[tabindex='0']")]
      .filter((element) => element.checkVisibility())
      .find((element) => element.scrollWidth > element.clientWidth + 1)"""
    if not await shown.value(f"{wide} !== undefined"):
        return
    await shown.value(f"{wide}.focus()")
    await shown.press("ArrowRight")
    await shown.until("document.activeElement.scrollLeft > 0")


async def walk(shown):
    """Tab from the start to the end: everything, in its order, seen, and marked."""
    number = await shown.value(f"{STOPS}.length")
    assert number > 0
    for place in range(number):
        await shown.press("Tab")
        found = await shown.value(FOCUSED)
        assert found["place"] == place, found
        assert found["outline"] >= 2, found
        assert found["visible"], found
    await shown.press("Tab")
    assert (await shown.value(FOCUSED))["place"] == -1, "more can be focused than is interactive"


def assert_usable_by_keys(page, tmp_path):
    """The skip link, every stop of Tab, what opens and what scrolls; on a phone's width."""
    with browser(tmp_path / "keys") as port:
        asyncio.run(use(page, port))
