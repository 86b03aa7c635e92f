"""Bugs of generation: caches, positions, masks of requests, sampling, the decoder's kernels."""

from __future__ import annotations

from .bug import Bug

CACHE = "flexmore_kernels/kv_cache.py"
KERNELS = "flexmore_kernels/_triton/attention.py"

BUGS = (
    Bug(
        "positions that go on where padding is",
        "RoPE is relative, so that left padding does not show it; a hole in a text does.",
        "flexmore_kernels/positions.py",
        "    return (mask.to(torch.int64).cumsum(1) - 1).clamp(min=0)\n",
        "    return torch.arange(length, device=device)[None]\n",
        "tests/test_model.py",
    ),
    Bug(
        "a cache that holds the caller's mask",
        "It is fixed for the request's life, until somebody writes into the tensor.",
        CACHE,
        "None if expert_mask is None else expert_mask.clone()",
        "expert_mask",
        "tests/test_kv_cache.py",
    ),
    Bug(
        "any mask may follow none",
        "None means all experts to begin with, and the mask there is later on.",
        CACHE,
        "            same = expert_mask.all() if mine is None else (expert_mask == mine).all()\n",
        "            same = mine is None or (expert_mask == mine).all()\n",
        "tests/test_kv_cache.py",
    ),
    Bug(
        "padding that comes late makes the past padding",
        "The first mask that a cache sees stands for all columns before it, which were tokens.",
        CACHE,
        "            old = ones[:, :past] if self._real is None else self._real\n",
        "            old = ~ones[:, :past] if self._real is None else self._real\n",
        "tests/test_kv_cache.py",
    ),
    Bug(
        "an ended request goes on",
        "Its stop is noticed, and the tokens after it are the model's all the same.",
        "flexmore_kernels/_aten/decoding.py",
        "chosen.masked_fill(finished, pad)[:, None]",
        "chosen[:, None]",
        "tests/test_generation.py",
    ),
    Bug(
        "a zero below the other",
        "Keys in the order of the bits: -0.0 is below 0.0, and the first of equals is not taken.",
        "flexmore_kernels/_triton/decoding.py",
        "tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)",
        "x.to(tl.int32, bitcast=True)",
        "tests/test_decoding.py",
        "interpreter",
    ),
    Bug(
        "a projection that is watched is passed over",
        "Its weight lies with the others, so one product computes it, and nobody calls it.",
        "flexmore_kernels/decoder.py",
        "if not plain or linear._forward_hooks or linear._forward_pre_hooks:",
        "if not plain:",
        "tests/test_decoder.py",
    ),
    Bug(
        "rows of v at the distance that they have alone",
        "v is a part of the product with q and k, whose rows are longer.",
        KERNELS,
        "        v = tl.load(v_ptr + row * v_stride + at,",
        "        v = tl.load(v_ptr + row * k_width + at,",
        "tests/test_attention.py",
        "interpreter",
    ),
    Bug(
        "top-p without the token that reaches it",
        "The sum up to and with a token is compared, so the last one that is needed is cut.",
        "flexmore_kernels/sampling.py",
        "p.cumsum(-1) - p  #",
        "p.cumsum(-1)  #",
        "tests/test_generation.py",
    ),
    Bug(
        "RoPE turns the other way",
        "The sign belongs to the other half: attention among turned heads hardly shows it.",
        KERNELS,
        "tl.where(first, -other, other)",
        "tl.where(first, other, -other)",
        "tests/test_attention.py",
        "interpreter",
    ),
    Bug(
        "parts of a softmax joined by unscaled sums",
        "Each part has a maximum of its own; its weights are scaled, its sum is forgotten.",
        KERNELS,
        "    whole = tl.sum(total * weight, 0)\n",
        "    whole = tl.sum(total, 0)\n",
        "tests/test_attention.py",
        "interpreter",
    ),
    Bug(
        "the norm of a head alone",
        "As in models that norm q and k by heads; OLMo-2 norms all heads together.",
        KERNELS,
        "    scale = row_scale(x.to(ACC), width, EPS)\n",
        "    scale = row_scale(tl.where(at < HEAD, x.to(ACC), 0.0), HEAD, EPS)\n",
        "tests/test_attention.py",
        "interpreter",
    ),
)
