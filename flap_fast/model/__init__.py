"""Batches -> embeddings: patches, masking, the two towers."""

from flap_fast.model.audio_vit import AudioViT
from flap_fast.model.htsat import HTSAT
from flap_fast.model.image_resnet import ImageResNet

# The audio encoders by their names in `audio.encoder`.
AUDIO_ENCODERS = {
    "vit": AudioViT,
    "htsat": HTSAT,
    # one line for each encoder
}
# The image encoders by their names in `image.encoder`.
IMAGE_ENCODERS = {
    "resnet50": ImageResNet,
    # one line for each encoder
}
