"""Batches -> embeddings: patches, masking, the two towers."""

from flap_fast.model.image_resnet import ImageResNet

# The image encoders by their names in `image.encoder`.
IMAGE_ENCODERS = {
    "resnet50": ImageResNet,
    # one line for each encoder
}
