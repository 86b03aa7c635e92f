"""Bugs around the kernels: gradients, dispatch, dtypes, stored weights, checkpoints, the model."""

from __future__ import annotations

from .bug import Bug

EXPERTS = "flexmore_kernels/ops/experts.py"
ROUTING = "flexmore_kernels/ops/routing.py"
LAYER = "flexmore_kernels/layer.py"
PREPARATION = "flexmore_kernels/preparation.py"
ATEN = "flexmore_kernels/_aten/experts.py"
DECODER = "flexmore_kernels/decoder.py"

BUGS = (
    # Gradients, and which are wanted
    Bug(
        "the needs of another argument",
        "Inputs are counted, and the ids between x and the weights need no gradient.",
        EXPERTS,
        "needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *ctx.needs_input_grad[3]]",
        "needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], *ctx.needs_input_grad[3]]",
        "tests/test_experts.py -k forward_and_backward",
    ),
    Bug(
        "no hidden gradient where only the router is trained",
        "A list of what needs it that forgets the routing weights.",
        ATEN,
        "        self.need_hidden = self.need_x or need_weights or any(inputs)\n",
        "        self.need_hidden = self.need_x or any(inputs)\n",
        "tests/test_experts.py::test_experts_needs_of_each_tensor",
    ),
    Bug(
        "routing weights without a gradient",
        "Detached as if routing were a constant: training goes on, the router learns nothing.",
        LAYER,
        "        p_TK = cast(routing.weights, ",
        "        p_TK = cast(routing.weights.detach(), ",
        "tests/test_layer.py",
    ),
    Bug(
        "logits handed out without a gradient",
        "They are returned for a balancing loss, whose gradient comes back beside the weights'.",
        ROUTING,
        "    dlogits = (dlogits + dlogits_out).to(x.dtype)\n",
        "    dlogits = dlogits.to(x.dtype)\n",
        "tests/test_routing.py",
    ),
    Bug(
        "the bias's gradient at zero is 1",
        "Every bias starts at 0, where min(b, 0) has a kink, and torch.minimum halves.",
        ROUTING,
        "0.5 * (bias == 0).to(dlogits.dtype)",
        "(bias == 0).to(dlogits.dtype)",
        "tests/test_routing.py",
    ),
    Bug(
        "an empty slot gets row 0's gradient",
        "-1 clamped to 0 so that the gather is legal, and not masked after it.",
        "flexmore_kernels/ragged.py",
        "    return torch.where(slot_to_row >= 0, values[slot_to_row.clamp(min=0).long()], 0)\n",
        "    return values[slot_to_row.clamp(min=0).long()]\n",
        "tests/test_gated_mix.py",
    ),
    Bug(
        "routing weights' gradients rounded to x's dtype",
        "Everything else that is returned has x's dtype; the weights are float32 beside bfloat16.",
        ATEN,
        ".dweights.view(-1)[slots.long()] = dweights\n",
        ".dweights.view(-1)[slots.long()] = dweights.to(x.dtype).to(dweights.dtype)\n",
        "tests/test_experts.py -k forward_and_backward",
    ),
    # Numbers
    Bug(
        "sums in bfloat16",
        "The accumulator takes the rows' dtype: each of K additions rounds.",
        "flexmore_kernels/_aten/permutation.py",
        "    acc = torch.promote_types(x_ND.dtype, torch.float32)\n",
        "    acc = x_ND.dtype\n",
        "tests/test_permutation.py",
    ),
    Bug(
        "the delta rounded before the base is added",
        "A product in bfloat16 rounds its result; where base and delta cancel, nothing is left.",
        "flexmore_kernels/_aten/gated_mix.py",
        "        return y_nF.addmm_(z_P[packed].view(-1, r).to(acc), b_FR[:, rank].t().to(acc))\n",
        "        return y_nF + z_P[packed].view(-1, r) @ b_FR[:, rank].t()\n",
        "tests/test_gated_mix.py",
    ),
    Bug(
        "autocast inside an op",
        "Autocast recasts the aten calls in a kernel, whose inputs have their dtypes for a reason.",
        "flexmore_kernels/library.py",
        "        if not torch.is_autocast_enabled(device):\n",
        "        if True:\n",
        "tests/test_layer_dtypes.py",
    ),
    # Layouts that kernels do not take
    Bug(
        "a kernel given strided rows",
        "A view of every second column has the right shape and the wrong strides.",
        EXPERTS,
        '    x, weights = contiguous("x", x), weights.contiguous()\n',
        "    weights = weights.contiguous()\n",
        "tests/test_experts.py::test_experts_int32_ids_and_strides",
        "interpreter",
    ),
    Bug(
        "a kernel given transposed weights",
        "contiguous() on one argument and not on the other.",
        "flexmore_kernels/ops/permutation.py",
        "    weights = None if weights is None else weights.contiguous()\n",
        "",
        "tests/test_permutation.py",
        "interpreter",
    ),
    Bug(
        "a fake result of another dtype",
        "The fake says x's dtype; in float32 that is right, and eager mode never asks it.",
        ROUTING,
        "return logits.new_empty(shape, dtype=acc), ",
        "return logits.new_empty(shape), ",
        "tests/test_routing_contract.py",
    ),
    # Weights that are stale, swapped or thawed
    Bug(
        "projected rows that stay",
        "Kept rows are never compared with the weights again; nothing shows until one is written.",
        "flexmore_kernels/router.py",
        "if kept is None or kept.stamps != now:",
        "if kept is None:",
        "tests/test_router.py",
    ),
    Bug(
        "a shared expert inside the softmax",
        "It still has its slot of weight 1; the others' weights are small by its share.",
        "flexmore_kernels/shared_expert.py",
        "tuple(e != shared for e in range(num_experts))",
        "(True,) * num_experts",
        "tests/test_shared_expert.py",
    ),
    Bug(
        "parameters looked up once",
        "The list of weights kept on the layer: load_state_dict(assign=True) makes new ones.",
        PREPARATION,
        "        return [self.experts.projection(name) for name in PROJECTIONS]\n",
        '        return self.__dict__.setdefault("_weights", '
        "[self.experts.projection(name) for name in PROJECTIONS])\n",
        "tests/test_storage.py",
    ),
    Bug(
        "up's factors read from gate's place",
        "Prepared, gate's and up's A lie in one matrix: up's begin where gate's end.",
        PREPARATION,
        "            start = sum(self.ranks[0] or ()) if index == 1 else 0\n",
        "            start = 0\n",
        "tests/test_preparation.py",
    ),
    Bug(
        "a stale base is served",
        "Merged matrices contain the base: its writes count, too.",
        PREPARATION,
        "            if names:\n                found.append(_full(side)[0])\n",
        "",
        "tests/test_preparation.py",
    ),
    Bug(
        "factors packed once",
        "Packed by identity or version: a fused optimizer and `.data` change neither.",
        "flexmore_kernels/projection.py",
        "    def _pack(self, which: int, multiple: int) -> Tensor:\n",
        '    @__import__("functools").lru_cache\n'
        "    def _pack(self, which: int, multiple: int) -> Tensor:\n",
        "tests/test_storage.py",
        "interpreter",
    ),
    Bug(
        "gate and up swapped",
        "Both are (F, D): no shape tells them apart.",
        LAYER,
        "zip(PROJECTIONS, (gate, up, down), strict=True):\n                for weight",
        "zip(PROJECTIONS, (up, gate, down), strict=True):\n                for weight",
        "tests/test_layer.py",
    ),
    Bug(
        "frozen factors thaw when they are loaded",
        "assign=True makes a new parameter, and a new parameter needs a gradient.",
        "flexmore_kernels/storage.py",
        "nn.Parameter(new, requires_grad=old.requires_grad)",
        "nn.Parameter(new)",
        "tests/test_storage.py",
    ),
    # Checkpoints and the model
    Bug(
        "transposed factors pass",
        "Shapes compared as if their order did not matter: some checkpoints store (in, r).",
        "flexmore_kernels/checkpoint_layout.py",
        "        if found[name] != shape:\n",
        "        if sorted(found[name]) != sorted(shape):\n",
        "tests/test_checkpoint.py",
    ),
    Bug(
        "the first layer's ranks for every layer",
        "config.json has one list; what the tensors of a layer hold may differ.",
        "flexmore_kernels/checkpoint.py",
        '        "expert_ranks": layout.layer_ranks[layer],\n',
        '        "expert_ranks": layout.layer_ranks[0],\n',
        "tests/test_checkpoint.py",
    ),
    Bug(
        "the norm before the attention",
        "As in most models, but OLMo-2 and FlexOlmo have it after.",
        DECODER,
        "        h = self.post_attention_layernorm(self.self_attn(h, step, cache), h)\n",
        "        h = h + self.self_attn(self.post_attention_layernorm(h), step, cache)\n",
        "tests/test_model.py",
    ),
    Bug(
        "no causal mask where there is no padding",
        "The padding's mask holds the causal one; without padding nobody passes either.",
        "flexmore_kernels/ops/attention.py",
        "is_causal=causal, ",
        "",
        "tests/test_model.py",
    ),
    Bug(
        "the model renormalises no weights",
        "An option that every published config leaves at its default is lost on the way.",
        DECODER,
        "            norm_topk_prob=config.norm_topk_prob,\n",
        "",
        "tests/test_model.py",
    ),
)
