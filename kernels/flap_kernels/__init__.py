"""flap_kernels."""
