"""The formats of sounds: what libsndfile reads, and what ffmpeg reads where it is installed.

ffmpeg gets only files that begin as one of its formats here does, and may open no other file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from flap_fast.data.preprocess.unusable import BadSound
from flap_fast.files import say

# Endings of files that libsndfile reads, the most usual ones first.
LIBSNDFILE = (
    *("flac", "wav", "ogg", "mp3", "opus", "oga", "aif", "aiff", "aifc", "au", "snd", "caf"),
    *("w64", "rf64", "bwf", "mp2", "mp1", "mpga", "sph", "voc"),
)
# Endings of files that ffmpeg reads.
FFMPEG = (
    *("m4a", "mp4", "m4b", "mov", "3gp", "webm", "mka", "mkv", "aac", "wma", "asf", "amr", "ac3"),
    *("eac3", "ape", "wv"),
)
SOUNDS = (*LIBSNDFILE, *FFMPEG)

# How they begin, from which byte.
_BEGINS = (
    (4, b"ftyp", "MP4 (m4a, mp4, mov)"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska (webm, mka, mkv)"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF (wma)"),
    (0, b"\xff\xf0", "AAC"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf8", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"ADIF", "AAC"),
    (0, b"#!AMR", "AMR"),
    (0, b"\x0b\x77", "AC-3"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"wvpk", "WavPack"),
    (28, b"\x7fFLAC", "FLAC in Ogg"),
)
# What in ffmpeg prints a line, and its address in memory, which differs from run to run.
_SPEAKER = re.compile(r"^(\[[^\]]* @ 0x[0-9a-f]+\] *)+", re.MULTILINE)
# A second more than a sound may last: a longer one is refused, not cut.
_SECONDS = 24 * 3600 + 1


def sounds_among(files: Iterable[Path], *, known: Iterable[str] = ()) -> list[Path]:
    """The sounds among files, by their endings; how many others there are is said on stderr.

    Args:
        known: endings of files that are expected beside sounds.
    """
    files, endings = list(files), {f".{ending}" for ending in SOUNDS}
    found = [file for file in files if file.suffix.lower() in endings]
    expected = endings.union(known)
    others = Counter(f.suffix.lower() or f.name for f in files if f.suffix.lower() not in expected)
    if others:
        kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(8))
        say(f"{others.total()} files are no sounds by their endings: {kinds}", error=True)
    return found


def ffmpeg_format(head: bytes) -> str | None:
    """The name of a format that libsndfile does not read and ffmpeg does.

    Args:
        head: the first 64 bytes after tags.
    """
    return next((name for at, magic, name in _BEGINS if head[at:].startswith(magic)), None)


@contextmanager
def as_wav(source: Path | bytes, name: str) -> Iterator[Path]:
    """A WAV of the first sound in a file, decoded by ffmpeg: 16 bits, at its rate and channels.

    Raises:
        BadSound: ffmpeg is not installed, or cannot read all of it: of a truncated or damaged file
            it gives what there is, and only says so.
    """
    command = shutil.which("ffmpeg")
    if command is None:
        raise BadSound(
            f"unreadable: {name} needs the command ffmpeg, which is not installed; "
            "install it, or convert the sound to FLAC"
        )
    with TemporaryDirectory(prefix="flap-") as folder:
        wav, given = Path(folder) / "sound.wav", source
        if isinstance(given, bytes):  # not by a pipe: the index of an MP4 may be at its end
            given = Path(folder) / "given"
            given.write_bytes(source)  # type: ignore[arg-type] - bytes, as asked above
        call = [command, "-v", "error", "-nostdin", "-protocol_whitelist", "file"]
        call += ["-t", str(_SECONDS), "-i", f"file:{given}", "-map", "0:a:0"]
        call += ["-c:a", "pcm_s16le", "-rf64", "auto", f"file:{wav}"]
        done = subprocess.run(call, capture_output=True, check=False)
        said = _SPEAKER.sub("", done.stderr.decode(errors="replace")).strip().splitlines()
        if done.returncode or said:
            raise BadSound(
                f"unreadable: {name}, of which ffmpeg says: {said[0] if said else 'no reason'}; "
                "fetch it again, or convert the sound to FLAC, if the rest will do"
            )
        yield wav
