"""Triton kernels that measure, decide and record a step on CUDA, in place of many tensor operations."""
