"""Batches -> embeddings: patches, masking, the two towers."""

from flap_fast.encoders.clip_resnet.model import ClipResNet
from flap_fast.encoders.htsat.model import HTSAT
from flap_fast.encoders.vit.model import ViT

# The audio encoders by their names in `audio.encoder`.
AUDIO_ENCODERS = {
    "vit": ViT,
    "htsat": HTSAT,
    # one line for each encoder
}
# The image encoders by their names in `image.encoder`.
IMAGE_ENCODERS = {
    "resnet50": ClipResNet,
    # one line for each encoder
}
