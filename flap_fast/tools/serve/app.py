"""The endpoints: embed, rank, classify and search; a page for people, and one on the API."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from fastapi import (  # pyright: ignore[reportMissingImports] - an extra
    Depends,
    FastAPI,
    File,
    Form,
    Query,
    Request,
    UploadFile,
)
from fastapi.exceptions import RequestValidationError  # pyright: ignore[reportMissingImports]
from fastapi.responses import (  # pyright: ignore[reportMissingImports]
    FileResponse,
    HTMLResponse,
    JSONResponse,
)
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]

from flap_fast.checks import ConfigError
from flap_fast.files import visible
from flap_fast.tools.embedder import Embedder
from flap_fast.tools.inputs import distinct
from flap_fast.tools.search import Index
from flap_fast.tools.serve.answers import (
    Caption,
    Class,
    Classes,
    ClassRow,
    Embeddings,
    Health,
    Ranking,
    Results,
    Row,
    Rows,
    Served,
    Texts,
    embedding,
    results,
    texts_within,
    timed_rows,
)
from flap_fast.tools.serve.gate import ASGI, Limits, gated
from flap_fast.tools.serve.uploads import Refused, required

# What browsers play; others they may save.
_MEDIA_TYPES = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".mp3": "audio/mpeg",
}

# The fields that may be given several times.
_LISTS = ("captions", "labels")

Sound: TypeAlias = Annotated[UploadFile, File(description="A sound: WAV, FLAC, OGG or MP3.")]
Windows: TypeAlias = Annotated[
    str | None, Form(description="SECONDS[:HOP] or auto: a row for each window, with its time.")
]
Offset: TypeAlias = Annotated[int, Query(ge=0, le=10**7, description="Results to leave out.")]
Most: TypeAlias = Annotated[int, Query(ge=1, description="Results to return at most.")]
Names: TypeAlias = Annotated[list[str], Form()]
Template: TypeAlias = Annotated[str, Form(description="A prompt with {label}.")]


def make_app(
    embedder: Embedder,
    index: Index | None,
    folder: Path | None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    hosts: frozenset[str] | None = None,
) -> ASGI:
    """Return the ASGI application of a model, and of the sounds of an index below a folder."""
    fields = [Depends(_known_fields)]
    app = FastAPI(
        title="flap_fast", version="1", docs_url=None, redoc_url=None, dependencies=fields
    )
    served = Served(embedder, index, folder, limits)
    _add_model(app, served)
    _add_search(app, served)
    _add_pages(app)
    _add_errors(app)
    return gated(app, limits, hosts)


async def _known_fields(request: Request) -> None:
    """Refuse a field that the endpoint does not have, an empty one, and several of one that is no
    list.

    FastAPI ignores the first, takes the default for the second and the last of the others.
    """
    known = request.scope["route"].dependant
    if not known.query_params and not known.body_params:
        return  # a page, or a file
    parts = (
        ("the query", request.query_params, known.query_params),
        ("the form", await request.form(), known.body_params),
    )
    for part, values, fields in parts:
        if any(f.field_info.is_required() and f.alias not in values for f in fields):
            continue  # FastAPI says so
        names = [field.alias for field in fields]
        rule = f"have no field but {', '.join(names)}" if names else "have no field"
        for name in values:
            required(name in names, part, rule, name)
            if name not in _LISTS:
                required(values[name] != "", name, "have a value or be left out", "")
                required(len(values.getlist(name)) == 1, name, "be given once", "several")


def _add_model(app: FastAPI, served: Served) -> None:
    embedder, limits = served.embedder, served.limits

    @app.post("/embed/audio")
    def embed_audio(sound: Sound, windows: Windows = None) -> Rows:
        """Embed a sound: unit rows."""
        with served.lock:
            rows = timed_rows(served, _data(sound), windows)
        return Rows(rows=[Row(start_s=s, end_s=e, embedding=row.tolist()) for s, e, row in rows])

    @app.post("/embed/text")
    def embed_text(texts: Texts) -> Embeddings:
        """Embed texts: unit rows."""
        with served.lock:
            rows = embedder.embed_text(texts_within(limits, texts.texts, "texts"))
        return Embeddings(embeddings=rows.tolist())

    @app.post("/rank")
    def rank(sound: Sound, captions: Names) -> Ranking:
        """Rank captions by their cosine similarity to a sound, best first."""
        with served.lock:
            texts = embedder.embed_text(texts_within(limits, captions, "captions"))
            cosines = (texts @ embedding(served, _data(sound))).tolist()
        ranked = sorted(zip(captions, cosines, strict=True), key=lambda pair: -pair[1])
        return Ranking(captions=[Caption(caption=text, cosine=c) for text, c in ranked])

    @app.post("/classify")
    def classify(
        sound: Sound,
        labels: Names,
        template: Template = "This is a sound of {label}.",
        windows: Windows = None,
    ) -> Classes:
        """Classify a sound by the names of classes (zero-shot), the most likely first."""
        # One without {label} would name a file of the server.
        required("{label}" in template, "template", "contain {label}", template)
        texts_within(limits, [template], "template")
        names = distinct(texts_within(limits, labels, "labels"))
        rule = "name at least two classes, each in a field of its own"
        required(len(names) > 1, "labels", rule, ", ".join(names))
        with served.lock:
            vectors = embedder.embed_labels(names, template)
            rows = timed_rows(served, _data(sound), windows)
        classes = []
        for start_s, end_s, row in rows:
            pairs = zip(names, embedder.probabilities(row[None], vectors)[0].tolist(), strict=True)
            best = sorted(pairs, key=lambda pair: -pair[1])
            its = [Class(label=name, probability=p) for name, p in best]
            classes.append(ClassRow(start_s=start_s, end_s=end_s, classes=its))
        return Classes(rows=classes)


def _data(sound: UploadFile) -> bytes:
    kind = (sound.content_type or "").partition(";")[0].strip().lower()
    known = kind.startswith("audio/") or kind in ("", "application/octet-stream", "video/ogg")
    required(known, "the sound's Content-Type", "be audio/...", kind, status=415)
    return sound.file.read()


def _add_search(app: FastAPI, served: Served) -> None:
    @app.get("/search")
    def search(text: str, offset: Offset = 0, limit: Most = 20) -> Results:
        """Search the sounds by a text, best first."""
        required(bool(text.strip()), "text", "be the words to search for", text)
        with served.lock:
            (query,) = served.embedder.embed_text(texts_within(served.limits, [text], "text"))
            return results(served, query, offset, limit)

    @app.post("/search")
    def similar(sound: Sound, offset: Offset = 0, limit: Most = 20) -> Results:
        """Search the sounds by a sound, best first."""
        with served.lock:
            query = embedding(served, _data(sound), served.query_crop)
            return results(served, query, offset, limit)

    @app.get("/sounds/{number}", response_class=FileResponse)
    def sound_file(number: int) -> Any:
        """Return a sound of a search result."""
        path = served.sound(number)
        kind = _MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
        return FileResponse(path, media_type=kind)

    @app.get("/health")
    def health() -> Health:
        """Say what is served, and its limits."""
        sounds = 0 if served.index is None else len(served.index.files)
        limits = served.limits._asdict()
        return Health(model=served.embedder.identity, sounds=sounds, limits=limits)


def _add_pages(app: FastAPI) -> None:
    def text_of(name: str) -> str:
        return (files("flap_fast.tools.serve") / name).read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False, response_class=HTMLResponse)
    def page() -> str:
        return text_of("search.html")

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    def docs() -> str:
        return text_of("docs.html")


def _add_errors(app: FastAPI) -> None:
    """Answer errors with {"error": SENTENCE}; those that are bugs with a traceback in the log."""

    def answer(status: int, sentence: str, headers: Any = None) -> JSONResponse:
        error = visible(sentence, document=True)
        return JSONResponse({"error": error}, status, headers=headers)

    @app.exception_handler(Refused)
    def refused(_: Any, error: Refused) -> JSONResponse:
        return answer(error.status, str(error))

    @app.exception_handler(ConfigError)
    def invalid(_: Any, error: ConfigError) -> JSONResponse:
        return answer(422, str(error))

    @app.exception_handler(RequestValidationError)
    def incomplete(_: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:])) or "the body"
        if first["type"] == "missing":
            return answer(422, f"{name} must be given, got none")
        if first["type"] == "extra_forbidden":
            return answer(422, f"the body must have no field but texts, got {name!r}")
        if first["type"] == "json_invalid":
            why = f"{first['ctx']['error']} (character {first['loc'][1]})"
            return answer(422, f"the body must be JSON, got another text: {why}")
        if "UploadFile" in first["msg"]:
            return answer(422, f"{name} must be a file, got a text; curl -F {name}=@FILE sends one")
        return answer(422, f"{name} must be as /docs says, got another value: {first['msg']}")

    @app.exception_handler(HTTPException)
    def other(request: Any, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's, of a body that it cannot parse
            rule = "be readable as a form, or as JSON in UTF-8"
            return answer(422, f"the body must {rule}, got another: {error.detail}")
        if error.status_code in (404, 405):
            asked = f"{request.method} {request.url.path[:200]}"
            return answer(
                error.status_code, f"a request must be one of those in /docs, got {asked}"
            )
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    def bug(_: Any, error: Exception) -> JSONResponse:
        return answer(500, "the server failed, which it must not; its terminal says why")
