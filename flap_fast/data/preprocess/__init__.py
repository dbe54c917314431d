"""Encoded clips -> what an encoder is given: decoding, cropping, front ends."""
