"""The encoders of sounds, images and captions, a folder each."""
