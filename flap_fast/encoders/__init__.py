"""The encoders of sounds, images and captions, a folder each; this page is their registry.

An encoder's settings say what it can do, and everything else asks them: see `settings.py`. Its
module is imported when it is built, so that settings are checked before PyTorch is loaded.
"""

from __future__ import annotations

from flap_fast.encoders.audio_settings import AudioEncoder
from flap_fast.encoders.clip_resnet.settings import ClipResNetSettings
from flap_fast.encoders.clip_text.settings import ClipTextSettings
from flap_fast.encoders.htsat.settings import HTSATSettings
from flap_fast.encoders.roberta.settings import RobertaSettings
from flap_fast.encoders.settings import Encoder, ImageEncoder, TextEncoder
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.encoders.yamnet.settings import YamnetSettings

# The arms of each section; the first is the default.
AUDIO_ENCODERS: tuple[type[AudioEncoder], ...] = (
    ViTSettings,
    HTSATSettings,
    YamnetSettings,
    # one line for each encoder
)
IMAGE_ENCODERS: tuple[type[ImageEncoder], ...] = (ClipResNetSettings,)
TEXT_ENCODERS: tuple[type[TextEncoder], ...] = (RobertaSettings, ClipTextSettings)

# Of each section of the config, the arms by their names.
ENCODERS: dict[str, dict[str, type[Encoder]]] = {
    "audio": {arm.name(): arm for arm in AUDIO_ENCODERS},
    "image": {arm.name(): arm for arm in IMAGE_ENCODERS},
    "text": {arm.name(): arm for arm in TEXT_ENCODERS},
}
