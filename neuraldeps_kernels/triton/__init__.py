"""Triton kernels, one file a hot path. Importing this package does not import triton."""
