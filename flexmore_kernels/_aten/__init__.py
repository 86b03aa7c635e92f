"""Raw kernels in plain PyTorch: on any device, of any floating dtype."""
