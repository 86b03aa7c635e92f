"""Raw kernels of the compiled library: thin wrappers over `torch.ops.flexmore_native`."""

from .. import native

native.available()  # loads the library, which registers the ops that the wrappers name
