"""How a browser shows a report: light, dark, and on a phone."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flap_fast.report.page import report

pytestmark = pytest.mark.browser

CHROMIUM = (
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars"),
)
LOOKS = {"light": (1280, 1), "dark": (1280, 0), "phone": (360, 1), "dark phone": (360, 0)}
"""Width, and Chromium's preferred color scheme."""

CONTRAST = """
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = rgb => rgb.map(v => linear(v / 255))
  .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
const rgba = color => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
const behind = e => {
  for (; e; e = e.parentElement) {
    const color = rgba(e.ownerDocument.defaultView.getComputedStyle(e).backgroundColor);
    if (color[3] === 1) return color.slice(0, 3);
  }
};
const contrast = (e, ink) => {
  const [low, high] = [light(rgba(ink).slice(0, 3)), light(behind(e))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
"""
"""An element's contrast with what is behind it, as in WCAG 2.2, 1.4.3."""
# What a page is like once it is laid out.
PROBE = (
    f"<script>{CONTRAST}"
    + """addEventListener("load", () => {
  const found = {width: innerWidth, page: document.documentElement.scrollWidth,
    clipped: [], contrast: {},
    boxes: [...document.querySelectorAll(".wide")].map(e => [e.clientWidth, e.scrollWidth])};
  const body = document.body.getBoundingClientRect();
  const margin = parseFloat(getComputedStyle(document.body).paddingLeft);
  const [left, right] = [body.left + margin, body.right - margin];
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e), svg = e.closest("svg");
    if (!box.width) continue;
    if (!e.closest(".wide, pre") && (box.left < left - 1 || box.right > right + 1))
      found.clipped.push(e.outerHTML.slice(0, 80));
    if (e.tagName === "text") {
      const all = svg.getBoundingClientRect();
      if (box.left < all.left - 1 || box.right > all.right + 1 ||
          box.top < all.top - 1 || box.bottom > all.bottom + 1)
        found.clipped.push(svg.getAttribute("aria-label") + ": " + e.textContent);
    }
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE", "AUDIO"].includes(e.tagName)) continue;
    const seen = contrast(e, svg ? style.fill : style.color);
    const name = `${svg ? "svg " : ""}${e.tagName}.${e.className.baseVal ?? e.className}`;
    found.contrast[name] = Math.min(found.contrast[name] ?? 99, seen);
  }
  for (const row of ["ours", "chance"])
    found[row] = getComputedStyle(document.querySelector(`tr.${row} td`)).fontWeight;
  found.unnamed = [...document.querySelectorAll("svg, img, audio")]
    .filter(e => !(e.getAttribute("aria-label") || e.getAttribute("alt"))).length;
  parent.postMessage(JSON.stringify(found), "*");
});</script></body>"""
)
# Chromium's windows are at least 500 wide where it prints the page; a frame may be narrower.
FRAME = """<!doctype html><body><script>
  addEventListener("message", e => document.body.setAttribute("found", e.data));
</script><iframe src="probed.html" style="border: 0; height: 2000px; width: {}px"></iframe>"""


def browse(page: Path, folder: Path, look: str, height: int, *options: str) -> str:
    """What Chromium prints of a page."""
    width, scheme = LOOKS[look]
    shown = (f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}")
    command = [*CHROMIUM, f"--user-data-dir={folder}/user", *shown, *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def probed(page: Path, folder: Path, look: str) -> dict[str, Any]:
    (folder / "probed.html").write_text(page.read_text().replace("</body>", PROBE))
    (folder / "frame.html").write_text(FRAME.format(LOOKS[look][0]))
    options = ("--virtual-time-budget=3000", "--dump-dom")
    dom = browse(folder / "frame.html", folder, look, 2000, *options)
    return json.loads(html.unescape(re.findall(r'found="([^"]*)"', dom)[0]))


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = report(run, tmp_path_factory.mktemp("page") / "page.html")
    assert out.stat().st_size < 5e6
    return out


@pytest.mark.parametrize("look", LOOKS)
def test_all_of_it_is_readable_and_nothing_is_cut_off(look: str, page: Path, tmp_path: Path):
    found = probed(page, tmp_path, look)
    assert found["width"] == LOOKS[look][0]
    assert found["page"] <= found["width"]
    assert found["clipped"] == []
    assert len(found["contrast"]) > 10
    assert {name: ratio for name, ratio in found["contrast"].items() if ratio < 4.5} == {}
    assert (found["ours"], found["chance"], found["unnamed"]) == ("600", "400", 0)
    # On a phone a table scrolls in its own box.
    assert any(inner > outer for outer, inner in found["boxes"]) == (found["width"] == 360)


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_a_screenshot_shows_text_and_figures_all_the_way_down(
    look: str, page: Path, tmp_path: Path
):
    shot, dark = tmp_path / "page.png", look == "dark"
    browse(page, tmp_path, look, 2400, f"--screenshot={shot}")
    image = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert image.shape == (2400, LOOKS[look][0], 3)
    paper = image[5, 5].mean()
    assert paper < 30 if dark else paper > 240
    drawn = np.abs(image - image[5, 5]).sum(2) > 200
    for part in np.array_split(drawn, 6):
        assert 0.005 < part.mean() < 0.6
    blue = (88, 166, 255) if dark else (9, 105, 218)
    assert (np.abs(image - blue).sum(2) < 12).sum() > 500  # the first line of every figure
    # A margin on both sides, also on a phone.
    assert not drawn[:, :8].any()
    assert not drawn[:, -8:].any()


def test_a_browser_can_play_every_clip(page: Path, tmp_path: Path):
    copy = tmp_path / "page.html"
    probe = """<script>addEventListener("load", () => setTimeout(() => {
      for (const a of document.querySelectorAll("audio")) a.setAttribute("seconds", a.duration);
    }, 2000));</script></body>"""
    copy.write_text(page.read_text().replace("</body>", probe))
    dom = browse(copy, tmp_path, "light", 2400, "--virtual-time-budget=5000", "--dump-dom")
    seconds = [float(s) for s in re.findall(r'seconds="([\d.]+)"', dom)]
    assert len(seconds) == 6
    assert all(0 < s <= 10 for s in seconds)
