"""`flap serve`: what it answers, what it refuses, and that it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
testclient = pytest.importorskip("fastapi.testclient")

from flap_fast.tools.embedder import Embedder  # noqa: E402
from flap_fast.tools.search import Index  # noqa: E402
from flap_fast.tools.serve.app import make_app  # noqa: E402
from flap_fast.tools.serve.gate import Limits, gated  # noqa: E402
from flap_fast.tools.serve.run import allowed_hosts, is_loopback  # noqa: E402
from tests.sounds import encode, noise, tone  # noqa: E402
from tests.test_cli import flap  # noqa: E402
from tests.tools.served import HOSTILE, RATE, opened, write_model, write_sounds  # noqa: E402

LIMITS = Limits(body_bytes=400_000, sound_s=10.0, texts=8, text_characters=50, windows=20)
HERE = "http://127.0.0.1:8000"
WAV = encode(noise(100, 2.5, RATE), RATE, "WAV")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("served") / "sounds")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model: Path, folder: Path) -> tuple[Embedder, Index]:
    return opened(model, folder)


@pytest.fixture(scope="module")
def client(served: tuple[Embedder, Index], folder: Path) -> Any:
    app = make_app(served[0], served[1], folder, LIMITS, allowed_hosts("127.0.0.1"))
    return testclient.TestClient(app, base_url=HERE)


def sound(data: bytes = WAV, kind: str = "audio/wav") -> dict[str, Any]:
    return {"files": {"sound": ("/etc/passwd", data, kind)}}


def test_a_sound_and_texts_are_embedded_ranked_and_classified_as_in_python(client, served):
    embedder, _ = served
    (row,) = client.post("/embed/audio", **sound()).json()["rows"]
    assert row == {
        "start_s": None,
        "end_s": None,
        "embedding": embedder.embed_audio([WAV])[0].tolist(),
    }
    texts = ["a dog barks", "rain", "\u96e8"]
    rows = client.post("/embed/text", json={"texts": texts}).json()["embeddings"]
    assert rows == embedder.embed_text(texts).tolist()
    ranked = client.post("/rank", **sound(), data={"captions": texts}).json()["captions"]
    assert [(row["caption"], row["cosine"]) for row in ranked] == embedder.rank(WAV, texts)
    (row,) = client.post("/classify", **sound(), data={"labels": texts}).json()["rows"]
    pairs = [(each["label"], each["probability"]) for each in row["classes"]]
    assert pairs == embedder.classify(WAV, texts)


def test_windows_have_their_times(client, served):
    (found,) = served[0].embed_windows([WAV], "1")
    rows = client.post("/embed/audio", **sound(), data={"windows": "1"}).json()["rows"]
    assert [[row["start_s"], row["end_s"]] for row in rows] == found.spans_s.tolist()
    assert [row["embedding"] for row in rows] == found.rows.tolist()
    asked = {"labels": ["a", "b"], "windows": "auto:1"}
    rows = client.post("/classify", **sound(), data=asked).json()["rows"]
    assert [row["start_s"] for row in rows] == [0, 1, 1.5]


def test_a_folder_is_searched_by_text_and_by_sound_page_by_page(client, served):
    embedder, index = served
    (wanted,) = index.nearest(embedder.embed_text(["rain"]), 1000)
    pages, offset = [], 0
    while not pages or pages[-1]["more"]:
        asked = {"text": "rain", "offset": offset, "limit": 10}
        pages.append(client.get("/search", params=asked).json())
        offset += 10
    found = [row for page in pages for row in page["results"]]
    assert [row["cosine"] for row in found] == [match.cosine for match in wanted]
    assert [(row["start_s"], row["end_s"]) for row in found] == [match.span_s for match in wanted]
    shown = HOSTILE.replace("\u202e", r"\u202e")
    names = [shown if match.path.name == HOSTILE else match.path.name for match in wanted]
    assert [row["name"] for row in found] == names
    assert len(found) > 30
    for text, rule in (("", "have a value"), (" \t", "be the words to search for")):
        answer = client.get("/search", params={"text": text})
        assert (answer.status_code, f"text must {rule}" in answer.text) == (422, True)
    data = index.path(index.files[7]).read_bytes()
    nearest = client.post("/search?limit=3", **sound(data)).json()["results"]
    assert len(nearest) == 3
    (row,) = index.nearest(embedder.embed_audio([data]), 1)[0]
    assert nearest[0]["cosine"] == row.cosine


def test_a_sound_is_searched_for_with_the_crops_of_the_index(model: Path, tmp_path: Path):
    for n in range(3):
        wave = np.concatenate(
            [noise(n, 2.0, RATE), noise(9, 2.0, RATE), tone(300 * n + 200, 2, RATE)]
        )
        (tmp_path / f"{n}.wav").write_bytes(encode(wave, RATE, "WAV"))
    app = make_app(*opened(model, tmp_path, "whole"), tmp_path, LIMITS)
    client = testclient.TestClient(app, base_url=HERE)
    for n in range(3):
        data = (tmp_path / f"{n}.wav").read_bytes()
        found = client.post("/search?limit=1", **sound(data)).json()["results"]
        assert (found[0]["name"], found[0]["cosine"]) == (f"{n}.wav", pytest.approx(1, abs=1e-5))


def test_sounds_are_served_by_number_and_nothing_else_is(client, served, folder: Path):
    _, index = served
    for number, file in enumerate(index.files):
        answer = client.get(f"/sounds/{number}")
        assert answer.content == index.path(file).read_bytes()
        assert answer.headers["content-type"] == "audio/wav"
        head = client.head(f"/sounds/{number}")
        assert (head.status_code, head.headers) == (200, answer.headers)
    assert [client.head(path).status_code for path in ("/", "/health", "/rank")] == [200, 200, 405]
    part = client.get("/sounds/0", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, (folder / "00.wav").read_bytes()[10:20])
    for path in (
        *("25", "-1", "1e3", "00.wav", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd"),
        *("%2e%2e/.flap-index-windows", "/etc/passwd", f"{'9' * 5000}", "%00", "0/../../x"),
    ):
        answer = client.get(f"/sounds/{path}")
        assert answer.status_code in (404, 422), path
        assert set(answer.json()) == {"error"}
        assert str(folder) not in answer.text


def test_a_sound_that_changed_or_is_gone_is_not_served(model: Path, tmp_path: Path):
    folder = write_sounds(tmp_path / "sounds")
    app = make_app(*opened(model, folder), folder, LIMITS)
    client = testclient.TestClient(app, base_url=HERE)
    (folder / "00.wav").write_bytes(WAV)
    (folder / "01.wav").unlink()
    (folder / "02.wav").unlink()
    (folder / "02.wav").symlink_to(folder / "03.wav")
    for number in range(3):
        answer = client.get(f"/sounds/{number}")
        error = answer.json()["error"]
        assert (answer.status_code, error[:38]) == (404, "the sound must be as it was when the s")
        assert error.endswith(f"got '0{number}.wav'")
    assert client.get("/sounds/3").status_code == 200


def flac_of(seconds: float, claimed: int) -> bytes:
    """A FLAC that says it has so many samples, of which 0 is an unknown number."""
    data = bytearray(encode(noise(0, seconds, RATE), RATE, "FLAC"))
    data[21] &= 0xF0  # the number has 36 bits, of which these are the highest
    data[22:26] = struct.pack(">I", claimed)
    return bytes(data)


def wav_of(channels: int, size: int, bits: int = 16, code: int = 1, data: bytes = b"\1" * 6400):
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, RATE, RATE * block, block, bits)
    head = (
        b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + b"WAVEfmt " + struct.pack("<I", 16)
    )
    return head + form + b"data" + struct.pack("<I", size) + data


NAN = wav_of(1, 6400, 32, 3, np.full(1600, np.nan, "<f4").tobytes())
HOUR = encode(np.zeros(3600 * 1000, "f4"), 1000, "FLAC")  # 12 kB
FLAC = encode(noise(0, 2.0, RATE), RATE, "FLAC")
BAD_SOUNDS = {
    "empty": (b"", "audio/wav", 422, "empty: the file has no bytes"),
    "text": (b"a dog barks " * 50, "audio/wav", 422, "unreadable"),
    "truncated": (FLAC[: len(FLAC) // 2], "audio/flac", 422, "unreadable"),
    "10 h claimed": (
        flac_of(1.0, 36_000 * RATE),
        "audio/flac",
        422,
        "its header says 576000000 samples",
    ),
    "1 h of silence": (HOUR, "audio/flac", 413, "the sound must last at most 10 s, got 3600"),
    "10 h in a WAV": (wav_of(1, 2 * 36_000 * RATE), "audio/wav", 422, "its header says"),
    "12 s": (
        encode(tone(300, 12.0, 8000), 8000, "WAV"),
        "audio/wav",
        413,
        "must last at most 10 s",
    ),
    "12 s of MP3": (encode(tone(300, 12.0, RATE), RATE, "MP3"), "audio/mpeg", 413, "at most 10 s"),
    "12 s, unknown": (flac_of(12.0, 0), "audio/flac", 413, "at most 10 s, got 'a longer one'"),
    "NaN": (NAN, "audio/wav", 422, "not finite"),
    "400 channels": (wav_of(400, 6400), "audio/wav", 422, "64 channels or fewer, got 400"),
    "8 channels at 192 kHz": (
        encode(np.zeros((999, 8), "f4"), 192_000, "FLAC"),
        "audio/flac",
        413,
        "the sound must have at most 1048576 samples a second, got 1536000",
    ),
    "a picture": (b"\x89PNG", "image/png", 415, r"Content-Type must be audio/..., got 'image/png'"),
    "MP4": (b"\0\0\0\x20ftypM4A " + bytes(90), "audio/mp4", 415, "must be WAV, FLAC, OGG or MP3"),
    "too large": (bytes(400_001), "audio/wav", 413, "must have at most 400000 bytes, got more"),
}


@pytest.mark.parametrize("what", BAD_SOUNDS)
def test_a_bad_sound_is_refused_in_one_sentence(what: str, client):
    data, kind, status, error = BAD_SOUNDS[what]
    for path, fields in (("/embed/audio", {}), ("/rank", {"captions": ["a"]}), ("/search", {})):
        answer = client.post(path, **sound(data, kind), data=fields)
        assert answer.status_code == status, answer.text
        assert set(answer.json()) == {"error"}
        said = answer.json()["error"]
        assert error in said
        assert "\n" not in said
        assert "passwd" not in said


def test_a_flac_that_does_not_know_its_length_is_counted(client):
    answer = client.post("/embed/audio", **sound(flac_of(2.0, 0), "audio/flac"))
    whole = client.post("/embed/audio", **sound(FLAC, "audio/flac"))
    assert (answer.status_code, answer.json()) == (200, whole.json())


def json_body(text: bytes, kind: str = "application/json") -> dict[str, Any]:
    return {"content": text, "headers": {"Content-Type": kind}}


BAD_REQUESTS = {
    "too many texts": ("/embed/text", {"json": {"texts": ["a"] * 9}}, 422, "at most 8 texts"),
    "no text": ("/embed/text", {"json": {"texts": []}}, 422, "one at least, got 0"),
    "a long text": ("/embed/text", {"json": {"texts": ["a" * 51]}}, 422, "at most 50 characters"),
    "one text": ("/embed/text", {"json": {"texts": "a"}}, 422, "texts must be as /docs says"),
    "nothing": ("/embed/text", json_body(b""), 422, "the body must be given"),
    "not UTF-8": ("/embed/text", json_body(b'{"texts": ["\xe9"]}'), 422, "JSON in UTF-8"),
    "a surrogate": ("/embed/text", json_body(b'{"texts": ["\\ud800"]}'), 422, "valid Unicode"),
    "no JSON": ("/embed/text", json_body(b'{"texts": [dog]}'),
                422, "the body must be JSON, got another text: Expecting value (character 11)"),
    "1,001 fields": ("/classify", {**sound(), "data": {"labels": [f"{n}" for n in range(1001)]}},
                     422, "got another: Too many fields. Maximum number of fields is 1000"),
    "a name for a file": ("/embed/audio", {"files": {"sound": (None, "dog.wav")}},
                          422, "sound must be a file, got a text; curl -F sound=@FILE sends one"),
    "deep": ("/embed/text", json_body(b'{"texts": ' + b"[" * 10**5), 422, "must be"),
    "another type": ("/embed/text", json_body(b"{}", "text/plain"), 415, "application/json"),
    "JSON for a form": ("/rank", {"json": {}}, 415, "must be multipart/form-data"),
    "no boundary": ("/rank", json_body(b"x", "multipart/form-data"), 422, "must be"),
    "no sound": ("/rank", {"files": {"other": b"x"}}, 422, "sound must be given, got none"),
    "no captions": ("/rank", sound(), 422, "captions must be given"),
    "a file": ("/classify", {**sound(), "data": {"labels": ["a"], "template": "/etc/passwd"}},
               422, "template must contain {label}"),
    "windows": ("/embed/audio", {**sound(), "data": {"windows": "7"}}, 422, "a window must be in"),
    "too many windows": ("/embed/audio", {**sound(), "data": {"windows": "1:0.02"}},
                         422, "windows must give at most 20, got 126"),
    "too many results": ("/search?limit=101", sound(), 422, "limit must be at most 100"),
    "a wrong number": ("/search?limit=x", sound(), 422, "limit must be as /docs says"),
    "another field": ("/embed/audio", {**sound(), "data": {"window": "1"}},
                      422, "the form must have no field but sound, windows, got 'window'"),
    "another file": ("/rank", {"files": {"sound": ("a", WAV, "audio/wav"), "sound2": WAV},
                               "data": {"captions": ["a"]}},
                     422, "the form must have no field but sound, captions, got 'sound2'"),
    "two sounds": ("/embed/audio", {"files": [("sound", ("a", WAV, "audio/wav"))] * 2},
                   422, "sound must be given once, got 'several'"),
    "two templates": ("/classify", {**sound(), "data": {"labels": ["a", "b"],
                                                        "template": ["{label}", "a {label}"]}},
                      422, "template must be given once, got 'several'"),
    "one class": ("/classify", {**sound(), "data": {"labels": ["dog,cat", "dog,cat "]}},
                  422, "labels must name at least two classes, each in a field of its own"),
    "empty windows": ("/embed/audio", {**sound(), "data": {"windows": ""}},
                      422, "windows must have a value or be left out"),
    "a field in the query": ("/embed/audio?windows=1", sound(),
                             422, "the query must have no field, got 'windows'"),
    "another parameter": ("/search?limt=1", sound(),
                          422, "the query must have no field but offset, limit, got 'limt'"),
    "another key": ("/embed/text", {"json": {"texts": ["a"], "model": "b"}},
                    422, "the body must have no field but texts, got 'model'"),
    "nowhere": ("/nowhere", sound(), 404, "one of those in /docs, got POST /nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_request_is_refused_in_one_sentence(what: str, client):
    path, request, status, error = BAD_REQUESTS[what]
    answer = client.post(path, **request)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert error in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_pages_of_other_sites_and_names_are_refused(client):
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:8000"}, {"Host": ""}):
        answer = client.get("/health", headers=headers)
        assert (answer.status_code, "Host must be one of" in answer.text) == (403, True)
    assert client.get("/health", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    found = [client.get(path, headers=link).status_code for path in ("/?text=a", "/docs")]
    assert found == [200, 200]
    for path in ("/health", "/search?text=a", "/sounds/0"):
        assert client.get(path, headers=link).status_code == 403
    assert client.post("/", headers=link).status_code == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "[::1]"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    assert allowed_hosts("0.0.0.0") is None
    assert [is_loopback(host) for host in ("::1", "127.3.2.1", "192.168.0.1", "example.org")] == [
        *(True, True),
        *(False, False),
    ]


def ask(app: Any, receive: Any, **scope: Any) -> tuple[int, str]:
    """The status and the body that an ASGI application answers to a POST of a form."""
    kind = (b"content-type", b"multipart/form-data; boundary=x")
    about = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"}
    about |= {"path": "/rank", "raw_path": b"/rank", "query_string": b"", "scheme": "http"}
    about |= {"headers": [(b"host", b"127.0.0.1"), kind], "root_path": ""} | scope
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(about, receive, send))
    return sent[0]["status"], b"".join(part.get("body", b"") for part in sent[1:]).decode()


def test_a_body_is_refused_while_it_streams(served, folder: Path):
    pulled = 0

    async def receive() -> dict[str, Any]:
        nonlocal pulled
        pulled += 1
        head = b'--x\r\nContent-Disposition: form-data; name="sound"; filename="a"\r\n\r\n'
        body = (head if pulled == 1 else b"") + bytes(65_536)
        return {"type": "http.request", "body": body, "more_body": True}  # without an end

    status, said = ask(make_app(served[0], served[1], folder, LIMITS), receive)
    assert (status, json.loads(said)) == (
        413,
        {"error": "a request must have at most 400000 bytes, got more"},
    )
    assert pulled == 7  # 7 x 65536 > 400000

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    status, said = ask(
        make_app(served[0], served[1], folder, LIMITS._replace(receive_s=0.05)), never
    )
    assert (status, "must arrive within 0.05 s" in said) == (408, True)


def test_more_requests_than_may_wait_are_sent_away_and_later_ones_are_not():
    inside: list[int] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        inside.append(1)
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = gated(slow, Limits(waiting=2), None)
    kind = [(b"content-type", b"multipart/form-data")]
    scope = {"type": "http", "method": "POST", "path": "/rank", "headers": kind}

    async def status() -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, None, send)  # type: ignore[arg-type] - it is not read
        return sent[0]["status"]

    async def five() -> list[int]:
        found = await asyncio.gather(*(status() for _ in range(5)))
        return [*found, await status()]

    assert asyncio.run(five()) == [200, 200, 503, 503, 503, 200]
    assert len(inside) == 3


@pytest.fixture
def server(model: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "flap_fast", "serve", model, "--audio", folder]
    options = ["--port", "0", "--windows", "1"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_server_answers_on_loopback_and_ctrl_c_ends_it(server: subprocess.Popen[str], served):
    assert server.stderr is not None
    line = server.stderr.readline()
    assert line.startswith("http://127.0.0.1:"), line
    url = line.split()[0]
    found = json.load(urllib.request.urlopen(f"{url}/search?text=rain&limit=1", timeout=30))
    wanted = served[1].nearest(served[0].embed_text(["rain"]), 1)[0][0]
    assert found["results"][0]["cosine"] == pytest.approx(wanted.cosine, abs=1e-6)
    large = urllib.request.Request(f"{url}/health", headers={"X": "x" * 200_000})
    with pytest.raises(urllib.error.HTTPError, match="HTTP Error 4"):
        urllib.request.urlopen(large, timeout=30)
    # A client that only begins to send is not waited for.
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as half:
        kind = b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 99\r\n\r\n--x"
        half.sendall(b"POST /rank HTTP/1.1\r\nHost: 127.0.0.1\r\n" + kind)
        time.sleep(0.2)
        begun = time.monotonic()
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 130
        assert time.monotonic() - begun < 2
    assert "Traceback" not in server.stderr.read()


def test_the_command_refuses_what_cannot_be_served_and_warns_of_other_machines(
    model: Path, monkeypatch, capsys
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert flap("serve", "no-model", "--port", port, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "--host and --port must be an address of this machine and a free port, got" in said
    assert "; --port 0 takes a free one" in said
    monkeypatch.setattr("flap_fast.tools.serve.run.serve", lambda *_: None)
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        asked = ("serve", model, "--host", host, "--port", "0")
        assert flap(*asked, monkeypatch=monkeypatch) == 0
        warning = f"{host} can be reached by others, and flap serve has no authentication"
        assert (warning in capsys.readouterr().err) == warned
    assert flap("serve", model, "--audio", model / "no", monkeypatch=monkeypatch) == 2
    assert "--audio must be a folder" in capsys.readouterr().err
    for option in ("--windows", "--crop", "--index"):
        assert flap("serve", model, "--port", "0", option, "1", monkeypatch=monkeypatch) == 2
        assert f"{option} must be left out without --audio, got '1'" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert flap("serve", model, monkeypatch=monkeypatch) == 2
    assert "pip install 'flap_fast[serve]'" in capsys.readouterr().err
