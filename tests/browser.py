"""A real browser without a window, for pages that the project writes."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
PHONE = 390  # CSS pixels

# The page stands in a frame as wide as a phone, and what is measured ends in the outer document.
WRAPPER = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:800px" srcdoc="{page}"></iframe>
<pre id="measured"></pre>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", async () => {{
  const inner = frame.contentDocument, images = [...inner.images];
  await Promise.all(images.map((image) => image.decode().catch(() => null)));
  document.getElementById("measured").textContent = JSON.stringify({{
    width: frame.clientWidth,
    scroll: inner.documentElement.scrollWidth,
    text: inner.body.innerText,
    drawn: images.filter((image) => image.complete && image.naturalWidth > 100).length,
    images: images.length,
    narrowest: Math.min(...images.map((image) => image.clientWidth)),
  }});
}});
</script>
"""


def find() -> str:
    """The browser's path. Where there is none, the test fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(
            f"no browser: none of {', '.join(NAMES)} is installed. apt install chromium, or leave "
            'its tests out with -m "not browser".'
        )
    return found


def look_at(page: str, folder: Path, width: int = PHONE) -> dict:
    """What the browser makes of a page: its size and text, its images, and the console's lines."""
    browser = find()
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, page=html.escape(page)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--timeout=60000"]
    done = subprocess.run(
        [browser, *flags, "--virtual-time-budget=20000", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    measured = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout, re.DOTALL)
    assert measured, done.stdout[-500:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(measured[1])) | {"console": console}
