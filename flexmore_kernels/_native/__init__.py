"""Raw kernels of the compiled library: thin wrappers over `torch.ops.flexmore_native`."""
