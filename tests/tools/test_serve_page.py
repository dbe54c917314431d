"""The page of `flap serve` in a browser: light, dark and on a phone."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
uvicorn = pytest.importorskip("uvicorn")

from flap_fast.tools.embedder import Embedder  # noqa: E402
from flap_fast.tools.search import Index  # noqa: E402
from flap_fast.tools.serve.app import make_app  # noqa: E402
from flap_fast.tools.serve.run import allowed_hosts, listening  # noqa: E402
from tests.report.test_look import CHROMIUM, CONTRAST, LOOKS  # noqa: E402
from tests.tools.served import HOSTILE, opened, write_model, write_sounds  # noqa: E402

pytestmark = pytest.mark.browser

# Uses the page as a person does and says what it saw. A frame may be narrower than a window.
FRAME = (
    """<!doctype html><body><iframe style="border: 0; height: 2000px; width: %dpx"></iframe>
<script type="module">
const tell = what => fetch("/found", {method: "POST", body: JSON.stringify(what)});
for (const kind of ["error", "unhandledrejection"])
  addEventListener(kind, event => tell({failed: String(event.reason ?? event.message)}));
const frame = document.querySelector("iframe");
const ready = new Promise(done => { frame.onload = done; });
frame.src = "/?text=rain";
await ready;
const page = frame.contentDocument, view = frame.contentWindow;
const all = what => [...page.querySelectorAll(what)];
const until = async holds => {
  for (let n = 0; n < 400 && !holds(); n++) await new Promise(done => setTimeout(done, 25));
};
const rows = () => all("#results li").map(li => ({
  name: li.querySelector(".name").firstChild.textContent.trim(),
  when: li.querySelector(".when").textContent,
  cosine: li.querySelector(".score span").textContent,
  bar: li.querySelector(".bar div").getBoundingClientRect().width /
    li.querySelector(".bar").getBoundingClientRect().width,
  label: li.querySelector("audio").getAttribute("aria-label"),
}));
"""
    + CONTRAST
    + """
await until(() => page.activeElement.id);  // autofocus comes with the first frame that is drawn
const found = {focus: page.activeElement.id, contrast: {}, clipped: []};
await until(() => rows().length && !page.getElementById("more").hidden &&
  page.getElementById("count").textContent);
found.title = page.querySelector("h1").textContent;
found.first = rows();
found.width = view.innerWidth;
found.page = page.documentElement.scrollWidth;
for (const e of all("body *")) {
  const box = e.getBoundingClientRect();
  const cut = box.width && (box.left < 15 || box.right > view.innerWidth - 15);
  if (cut) found.clipped.push(e.outerHTML);
  if (!box.width || !e.textContent.trim() || e.children.length) continue;
  const seen = contrast(e, view.getComputedStyle(e).color);
  found.contrast[e.tagName + "." + e.className] = seen;
}
found.unnamed = all("input, button, audio, a").filter(e => !(e.getAttribute("aria-label") ||
  e.textContent.trim() || page.querySelector(`label[for="${e.id}"]`))).length;
const timed = all("audio").find(e => !e.src.includes("#t=0,"));
found.timed = all("audio").indexOf(timed);
await new Promise(done => { timed.oncanplay = done; timed.preload = "auto"; timed.load(); });
found.plays = timed.currentTime;
timed.src = "/health";
await until(() => page.getElementById("status").className);
found.unplayed = page.getElementById("status").textContent;
page.getElementById("more").click();
await until(() => rows().length > found.first.length);
await until(() => page.activeElement.tagName === "AUDIO");
found.more = rows();
found.next = all("audio").indexOf(page.activeElement);
const drop = async (data, name) => {
  const moved = new view.DataTransfer();
  moved.items.add(new view.File([data], name, {type: "audio/wav"}));
  page.body.dispatchEvent(new view.DragEvent("drop", {dataTransfer: moved, bubbles: true}));
  await until(() => !page.getElementById("status").textContent.startsWith("Searching"));
};
await drop(await (await fetch("/sounds/0")).arrayBuffer(), "mine.wav");
found.similar = rows();
found.said = page.getElementById("status").textContent;
await drop("no sound", "bad.wav");
found.error = [page.getElementById("status").className, page.getElementById("status").textContent];
const long = {number: 0, name: "long", start_s: 59.96, end_s: 3599.97, cosine: 1};
view.fetch = async () => new Response(JSON.stringify({results: [long], more: false}));
page.getElementById("ask").requestSubmit();
await until(() => rows().length === 1);
found.rounded = rows()[0].when;
await tell(found);
</script></body>"""
)


class Served(NamedTuple):
    url: str
    said: Queue[dict[str, Any]]
    """What the frame found."""
    embedder: Embedder
    sounds: Index


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_sounds(tmp_path_factory.mktemp("served") / "sounds")
    embedder, index = opened(write_model(tmp_path_factory.mktemp("model")), folder)
    app = make_app(embedder, index, folder, hosts=allowed_hosts("127.0.0.1"))

    said: Queue[dict[str, Any]] = Queue()

    async def framed(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path", "").startswith("/frame/"):
            body = FRAME.replace("%d", scope["path"].removeprefix("/frame/")).encode()
            headers = [(b"content-type", b"text/html; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        elif scope.get("path") == "/found":
            body = b""
            while (message := await receive()).get("more_body"):
                body += message["body"]
            said.put(json.loads(body + message["body"]))
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await app(scope, receive, send)

    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(framed, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", said, embedder, index)
        server.should_exit = True
        thread.join()


def browser(url: str, folder: Path, look: str, *options: str) -> list[str]:
    """Chromium's command line."""
    width, scheme = LOOKS[look]
    shown = (f"--window-size={width},1200", f"--blink-settings=preferredColorScheme={scheme}")
    return [*CHROMIUM, f"--user-data-dir={folder}/user", *shown, *options, url]


@pytest.mark.parametrize("look", ["light", "dark phone"])
def test_a_person_finds_hears_and_compares_sounds(look: str, served: Served, tmp_path: Path):
    width = LOOKS[look][0]
    command = browser(f"{served.url}/frame/{width}", tmp_path, look)
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as chromium:
        try:
            found = served.said.get(timeout=60)
        finally:
            chromium.terminate()
    assert "failed" not in found, found
    assert (found["focus"], found["title"]) == ("text", "Search 25 sounds")
    (wanted,) = served.sounds.nearest(served.embedder.embed_text(["rain"]), 40)
    rows = found["more"]
    assert len(found["first"]) == 20
    assert found["first"] == rows[:20]
    assert [row["cosine"] for row in rows] == [f"{match.cosine:.3f}" for match in wanted]
    shown = HOSTILE.replace("\u202e", r"\u202e")
    names = [shown if match.path.name == HOSTILE else match.path.name for match in wanted]
    assert [row["name"] for row in rows] == names
    assert [row["bar"] for row in rows] == pytest.approx(
        [max(0, match.cosine) for match in wanted], abs=0.02
    )
    for row, match in zip(rows, wanted, strict=True):
        assert match.span_s is not None
        start, end = match.span_s
        assert row["when"] == f"0:{start:04.1f}\u20130:{end:04.1f}"
        assert row["label"] == f"{row['name']} {row['when']}"
    # It plays from where the window begins.
    span_s = wanted[found["timed"]].span_s
    assert span_s is not None
    assert span_s[0] > 0
    assert found["plays"] == pytest.approx(span_s[0], abs=0.01)
    assert found["unplayed"] == f"{rows[found['timed']]['name']}: this browser cannot play it"
    assert found["next"] == 20  # "Show more" leads to the first of the new ones
    # Similar ones to a sound that is dropped: its embedding is that of its middle, as commands'.
    data = served.sounds.path(served.sounds.files[0]).read_bytes()
    (near,) = served.sounds.nearest(served.embedder.embed_audio([data]), 20)
    assert [row["cosine"] for row in found["similar"]] == [f"{m.cosine:.3f}" for m in near]
    assert found["said"] == "Similar to mine.wav: the nearest 20"
    assert found["error"][0] == "error"
    assert found["error"][1].startswith("the sound must be readable, got one that is unreadable")
    assert found["rounded"] == "1:00.0\u201360:00.0"
    assert found["width"] == width
    assert found["page"] <= width
    assert found["clipped"] == []
    assert len(found["contrast"]) > 5
    assert {name: ratio for name, ratio in found["contrast"].items() if ratio < 4.5} == {}
    assert found["unnamed"] == 0


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_a_screenshot_shows_a_bar_as_long_as_each_score(look: str, served: Served, tmp_path: Path):
    shot, dark = tmp_path / "page.png", look == "dark"
    options = ("--virtual-time-budget=5000", f"--screenshot={shot}")
    command = browser(f"{served.url}/?text=rain", tmp_path, look, *options)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert image.shape == (1200, LOOKS[look][0], 3)
    paper = image[5, 5].mean()
    assert paper < 30 if dark else paper > 240
    blue, grey = ((88, 166, 255), (61, 68, 77)) if dark else ((9, 105, 218), (209, 217, 224))
    filled = (np.abs(image - blue).sum(2) < 12).sum(1)
    track = (np.abs(image - grey).sum(2) < 12).sum(1)
    # Lines of pixels through a bar; the button above has no track beside it.
    inside = (filled > 3) & (track > 50) & (np.arange(1200) > 180)
    begins = np.flatnonzero(inside & ~np.roll(inside, 1))
    ratios = [filled[at + 3] / (filled[at + 3] + track[at + 3]) for at in begins if at < 1190]
    (wanted,) = served.sounds.nearest(served.embedder.embed_text(["rain"]), 20)
    cosines = [match.cosine for match in wanted if match.cosine > 0.03][: len(ratios)]
    assert len(ratios) > 5
    assert ratios == pytest.approx(cosines, abs=0.02)
    margin = np.abs(image - image[5, 5]).sum(2) > 200
    assert not margin[:, :8].any()
    assert not margin[:, -8:].any()
