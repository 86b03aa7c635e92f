"""Triton kernels, one module a stem: for GPUs, and for CPU tensors in Triton's interpreter."""
