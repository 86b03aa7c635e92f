"""What is inside a block, whose modules' own forwards never run."""

from __future__ import annotations

from torch import nn


def children_of(block: nn.Module) -> tuple[tuple[dict, str, nn.Module], ...]:
    """All modules in a block, each with its siblings and its name there, which tell whether it was
    replaced since. Raises ValueError for PEFT's wrappers that act in a forward or on a parameter.
    """
    found = []
    for path, parent in block.named_modules():
        for name, module in parent._modules.items():
            if hasattr(module, "get_base_layer") and not hasattr(module, "modules_to_save"):
                raise ValueError(
                    f"{path}{'.' if path else ''}{name}: got PEFT's {type(module).__name__}, which "
                    "the kernels do not run; accepted: modules_to_save, or training the factors"
                )
            found.append((parent._modules, name, module))
    return tuple(found)
