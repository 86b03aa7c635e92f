"""The config of model type "flexmore": FlexOlmo's fields, and what each expert is.

expert_ranks         E ints: the largest rank of each expert in any layer and projection, 0 for
                     a full-size one; what the authors' reader knows
layer_expert_ranks   L lists of E entries, each as `FlexMoRE(expert_ranks=)` takes it; written
                     only where ranks differ by layer or projection
"""

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import FlexOlmoConfig
from transformers.utils import logging

from ..checkpoint_config import AUTO_MAP, LOADER, as_triple, largest_ranks, shortest
from ..checkpoint_layout import PROJECTIONS
from ..checks import SCORINGS, check_int, check_one_of
from ..router_kinds import ROUTER_FIELDS
from ..storage import parse_ranks
from .stored_ranks import stored_ranks

logger = logging.get_logger(__name__)


@strict  # reads the fields' types, so here annotations are no strings
class FlexMoREConfig(FlexOlmoConfig):
    """`FlexOlmoConfig`, whose defaults it has, with the ranks of the experts.

    Args:
        expert_ranks: E entries for all layers, or L lists of them, each as `fk.FlexMoRE` takes it;
            None makes all `num_experts` (7) experts full-size. Afterwards E ints, see above; what
            one layer holds is `layer_ranks(layer)`. Ranks above min(D, F) become that, as the
            authors' are powers of two also where a matrix has fewer singular values.
        layer_expert_ranks: L lists of E entries, where they differ; it wins over `expert_ranks`.
        scoring, expert_bias: as `fk.FlexMoRE`.

    Raises ValueError or TypeError naming the field.
    """

    model_type = "flexmore"
    # Attention is cut as FlexOlmo's; the mixture is computed whole on every rank.
    base_model_tp_plan = {
        name: style
        for name, style in FlexOlmoConfig.base_model_tp_plan.items()
        if ".experts" not in name
    }
    base_model_ep_plan = None

    num_experts: int | None = None
    expert_ranks: list | tuple | None = None
    layer_expert_ranks: list | tuple | None = None
    scoring: str = "softmax"
    expert_bias: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_one_of("scoring", self.scoring, SCORINGS)
        check_one_of("expert_bias", self.expert_bias, (False, True))
        check_one_of("hidden_act", self.hidden_act, ("silu", "swish"))
        for name in ROUTER_FIELDS:
            value = getattr(self, name, None)
            if value not in (None, False, "linear"):
                raise ValueError(
                    f"{name}: got {value!r}; accepted by transformers' form of the model: a linear "
                    "router without a shared expert; flexmore_kernels.checkpoint.load_model has all"
                )
        if self.layer_expert_ranks is not None:
            self._set_ranks("layer_expert_ranks", self.layer_expert_ranks)
        else:
            ranks = self.expert_ranks
            if ranks is None:
                ranks = [0] * (7 if self.num_experts is None else self.num_experts)
            # Entry 0 of a layer's list is the int 0, so a list there can only be a layer's list.
            if not ranks or not isinstance(ranks[0], (list, tuple)):
                ranks = [ranks] * self.num_hidden_layers
            self._set_ranks("expert_ranks", ranks)
        check_int("num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts)

    def _set_ranks(self, name: str, ranks: Sequence) -> None:
        """Both fields of ranks, from one list a layer."""
        if len(ranks) != self.num_hidden_layers:
            raise ValueError(
                f"{name}: got {len(ranks)} lists; accepted: num_hidden_layers, "
                f"{self.num_hidden_layers}"
            )
        layers = [self._layer_entries(name, entries) for entries in ranks]
        same = all(entries == layers[0] for entries in layers)
        plain = same and all(type(entry) is int for entry in layers[0])
        self.expert_ranks = list(layers[0]) if plain else largest_ranks(layers)
        self.layer_expert_ranks = None if plain else layers

    def _layer_entries(self, name: str, entries: Any) -> list:
        limit = min(self.hidden_size, self.intermediate_size)
        if isinstance(entries, (list, tuple)):
            above = [rank for rank in entries if type(rank) is int and rank > limit]
            entries = [limit if rank in above else rank for rank in entries]
            if above:
                logger.warning_once(f"{name}: {above} become min(D, F), {limit}")
        triples = parse_ranks(entries, limit, name)
        if self.num_experts is None:
            self.num_experts = len(triples)
        if len(triples) != self.num_experts:
            raise ValueError(
                f"{name}: got {len(triples)} entries; accepted: num_experts, {self.num_experts}"
            )
        found = map(shortest, triples)
        return [list(entry) if isinstance(entry, tuple) else entry for entry in found]  # as JSON

    def layer_ranks(self, layer: int) -> Sequence:
        """One layer's `expert_ranks`, as `fk.FlexMoRE` takes them."""
        if self.layer_expert_ranks is None:
            return self.expert_ranks
        return self.layer_expert_ranks[layer]

    def of_directory(self, directory: str | os.PathLike) -> "FlexMoREConfig":
        """This config with the ranks of the tensors in a directory, if it has any.

        What is stored is what can be loaded, and `expert_ranks` alone cannot say that ranks differ
        by layer. Raises ValueError for a matrix that is not there, unless the config says rank 0.
        """
        found = stored_ranks(Path(directory), self.num_experts)
        if found is None:
            return self
        config = copy.deepcopy(self)
        config._set_ranks("layer_expert_ranks", found)
        for layer in range(self.num_hidden_layers):
            pairs = zip(self.layer_ranks(layer), config.layer_ranks(layer), strict=True)
            for e, (said, stored) in enumerate(pairs):
                both = zip(PROJECTIONS, as_triple(said), as_triple(stored), strict=True)
                for projection, wanted, kind in both:
                    if kind == 0 != wanted:
                        name = f"model.layers.{layer}.mlp.experts.{e}.{projection}_proj"
                        raise ValueError(f"{name}: missing; the config says {wanted!r}")
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers', but a local directory's ranks are those of its tensors."""
        directory = Path(os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not directory.is_dir():
            return found
        if isinstance(found, tuple):
            return found[0].of_directory(directory), *found[1:]
        return found.of_directory(directory)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write config.json and, beside it, the few lines by which the directory loads with
        `trust_remote_code=True` where nobody imported this package."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(LOADER, Path(save_directory) / LOADER.name)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if values.get("layer_expert_ranks") is None:
            values.pop("layer_expert_ranks", None)
        return values

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Does nothing: `save_pretrained` always writes `auto_map`, and never our sources."""
