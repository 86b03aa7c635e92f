"""How a layer keeps its experts' weights: one parameter per matrix, or the factors stacked.

Both hold the same state_dict keys, `{e}.{gate,up,down}_proj.weight` for a full-size matrix and
`{e}.{gate,up,down}_proj_a.weight` (r, in), `..._b.weight` (out, r) for a low-rank one, and both
read their parameters anew at every call: nothing derived from a weight is kept.

`Experts` makes each of these an `nn.Parameter` of that name. `StackedExperts` keeps, per
projection, the factors of all low-rank experts in two parameters, a (R, in) and b (out, R), expert
after expert, for layers of so many experts that an op with a tensor argument for each would spend
milliseconds on the host. Its full-size matrices stay parameters of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .checks import check_int
from .ragged import StackedFactors, rank_offsets

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Entry = int | str
Triple = tuple[Entry, Entry, Entry]


def parse_ranks(expert_ranks: Iterable, limit: int, name: str = "expert_ranks") -> list[Triple]:
    """expert_ranks as E triples (gate, up, down) of "full", 0 (no delta) or a rank up to `limit`.

    An int 0 is a full-size expert, an int r > 0 has rank r three times; entry 0 must be an int 0.
    """
    if isinstance(expert_ranks, (str, bytes, dict, set)) or not isinstance(expert_ranks, Iterable):
        raise TypeError(
            f"{name}: got {expert_ranks!r}; accepted: a sequence with one rank an expert"
        )
    entries = list(expert_ranks)
    if not 1 <= len(entries) <= 1024:
        raise ValueError(f"{name}: got {len(entries)} entries; accepted: 1 to 1024")
    triples = [_parse_entry(f"{name}[{e}]", entry, limit) for e, entry in enumerate(entries)]
    if isinstance(entries[0], (list, tuple)) or triples[0] != ("full",) * 3:
        raise ValueError(f"{name}[0]: got {entries[0]!r}; accepted: 0, the base is full-size")
    return triples


def _parse_entry(name: str, entry: object, limit: int) -> Triple:
    if not isinstance(entry, (list, tuple)):
        return (check_int(name, entry, 0, limit) or "full",) * 3
    if len(entry) != 3:
        raise ValueError(f"{name}: got {entry!r}; accepted: one rank, or three (gate, up, down)")
    return tuple(_parse_part(f"{name}[{i}]", part, limit) for i, part in enumerate(entry))


def _parse_part(name: str, part: object, limit: int) -> Entry:
    if not isinstance(part, str):
        return check_int(name, part, 0, limit)
    if part != "full":
        raise ValueError(f'{name}: got {part!r}; accepted: a rank, 0 for no delta, or "full"')
    return part


class Weight(nn.Module):
    """A matrix (rows, columns), `weight`."""

    def __init__(self, rows: int, columns: int, **kind) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, **kind))

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


def _weight(module: nn.Module) -> Tensor:
    """`module.weight`; a parameter is found without a module's slow way to its attributes."""
    found = module._parameters.get("weight")
    return module.weight if found is None else found


def init_full(weight: Tensor) -> None:
    """normal(0.02)."""
    nn.init.normal_(weight, std=0.02)


def init_a(weight: Tensor) -> None:
    """Kaiming uniform, as `nn.Linear` and LoRA do."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def stamps(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where each tensor is and how often it was written, as far as torch counts."""
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def _sizes(hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, int]]:
    """(out, in) of each projection."""
    inward = (intermediate_size, hidden_size)
    return {"gate_proj": inward, "up_proj": inward, "down_proj": inward[::-1]}


class Experts(nn.ModuleList):
    """E modules, each with `{name}` or `{name}_a` and `{name}_b` per projection that it stores."""

    def __init__(self, sizes: tuple[int, int], triples: Sequence[Triple], **kind) -> None:
        super().__init__(nn.Module() for _ in triples)
        for expert, triple in zip(self, triples, strict=True):
            for (name, (rows, columns)), rank in zip(_sizes(*sizes).items(), triple, strict=True):
                if rank == "full":
                    expert.add_module(name, Weight(rows, columns, **kind))
                elif rank > 0:
                    expert.add_module(f"{name}_a", Weight(rank, columns, **kind))
                    expert.add_module(f"{name}_b", Weight(rows, rank, **kind))

    def reset_parameters(self) -> None:
        """Full-size normal(0.02), A Kaiming, B zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("_a.weight"):
                init_a(parameter)
            elif name.endswith("_b.weight"):
                nn.init.zeros_(parameter)
            else:
                init_full(parameter)

    def full(self, name: str) -> list[Tensor | None]:
        """E full-size weights of a projection, None where there is none."""
        modules = [expert._modules.get(name) for expert in self._modules.values()]
        return [None if module is None else _weight(module) for module in modules]

    def projection(self, name: str) -> list[Tensor | tuple[Tensor, Tensor] | None]:
        """What `ops.experts` takes for a projection: matrices, pairs, or None."""
        name_a, name_b = f"{name}_a", f"{name}_b"
        entries: list[Tensor | tuple[Tensor, Tensor] | None] = self.full(name)
        for e, expert in enumerate(self._modules.values()):
            if name_a in expert._modules:
                entries[e] = (_weight(expert._modules[name_a]), _weight(expert._modules[name_b]))
        return entries


class StackedExperts(nn.Module):
    """Full-size matrices as in `Experts`; the factors as `{name}_a` (R, in), `{name}_b` (out, R).

    The state_dict splits them into the experts' own keys (a as views, b as copies), and loading
    puts them together, with assign=True too. Freezing and optimizer groups act on whole stacks.
    """

    def __init__(self, sizes: tuple[int, int], triples: Sequence[Triple], **kind) -> None:
        super().__init__()
        self.num_experts = len(triples)
        self.ranks: dict[str, tuple[int, ...]] = {}
        for e, triple in enumerate(triples):
            if "full" in triple:
                self.add_module(str(e), nn.Module())
        for index, (name, (rows, columns)) in enumerate(_sizes(*sizes).items()):
            layout = [triple[index] for triple in triples]
            for e, rank in enumerate(layout):
                if rank == "full":
                    self._modules[str(e)].add_module(name, Weight(rows, columns, **kind))
            self.ranks[name] = tuple(0 if rank == "full" else rank for rank in layout)
            total = sum(self.ranks[name])
            for side, shape in (("a", (total, columns)), ("b", (rows, total))):
                # An empty parameter is of no use, and some optimizers and wrappers refuse it.
                stack = nn.Parameter(torch.empty(shape, **kind)) if total else None
                self.register_parameter(f"{name}_{side}", stack)

    def reset_parameters(self) -> None:
        """Full-size normal(0.02), A Kaiming (by the columns, so as each expert's), B zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("_a"):
                init_a(parameter)
            elif name.endswith("_b"):
                nn.init.zeros_(parameter)
            else:
                init_full(parameter)

    def full(self, name: str) -> list[Tensor | None]:
        """E full-size weights of a projection, None where there is none."""
        entries: list[Tensor | None] = [None] * self.num_experts
        for e, expert in self._modules.items():
            if name in expert._modules:
                entries[int(e)] = expert._modules[name].weight
        return entries

    def projection(self, name: str) -> list[Tensor | None] | StackedFactors:
        """What `ops.experts` takes for a projection."""
        full, a = self.full(name), getattr(self, f"{name}_a")
        if a is None:
            return full
        return StackedFactors(tuple(full), a, getattr(self, f"{name}_b"), self.ranks[name])

    def _slices(self) -> Iterator[tuple[str, str, int, int, int]]:
        """(key, stack, dimension, start, length) of every expert's factor."""
        for name, ranks in self.ranks.items():
            for e, (start, rank) in enumerate(zip(rank_offsets(ranks), ranks, strict=False)):
                for dim, side in enumerate("ab"):
                    if rank:
                        yield f"{e}.{name}_{side}.weight", f"{name}_{side}", dim, start, rank

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        for key, stack, dim, start, rank in self._slices():
            piece = getattr(self, stack).narrow(dim, start, rank)
            destination[prefix + key] = piece if keep_vars else piece.detach().contiguous()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        pieces: dict[str, list[Tensor]] = {}
        for key, stack, dim, start, rank in self._slices():
            # Taken out, so that the children that hold the full-size matrices do not see them.
            given, piece = state_dict.pop(prefix + key, None), getattr(self, stack).data
            piece = piece.narrow(dim, start, rank)
            if given is None:
                missing_keys.append(prefix + key)
            elif not isinstance(given, Tensor) or given.shape != piece.shape:
                got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                error_msgs.append(
                    f"size mismatch for {prefix + key}: copying a param with shape {got} from "
                    f"checkpoint, the shape in current model is {tuple(piece.shape)}."
                )
            elif local_metadata.get("assign_to_params_buffers", False):
                pieces.setdefault(stack, []).append(given)
            else:
                piece.copy_(given)
        for stack, given in pieces.items():
            old, dim = getattr(self, stack), "ab".index(stack[-1])
            if sum(piece.shape[dim] for piece in given) != old.shape[dim]:
                error_msgs.append(f"{prefix}{stack}: assign=True needs the factors of all experts.")
                continue
            new = torch.cat([piece.detach() for piece in given], dim)
            setattr(self, stack, nn.Parameter(new, requires_grad=old.requires_grad))
        if strict:
            children = tuple(f"{prefix}{name}." for name in self._modules)
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix)
                and not key.startswith(children)
                and key not in unexpected_keys
            ]
