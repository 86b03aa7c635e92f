"""Rows from domain embeddings and from hidden states, against the formulas in reference/.

Traps covered: chosen experts alone, a shared expert, names, rows that are there already, documents
longer than a sequence, padding, prompts of different lengths, nothing written where one is wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from router_models import (
    D,
    assert_unchanged,
    bits,
    make_model,
    own_words,
    projected,
    rows_of,
    seen,
    some_texts,
)

from flexmore_kernels import FlexMoREConfig, FlexMoREForCausalLM, testing
from flexmore_kernels.domain_embedding import load_embeddings
from flexmore_kernels.router_inputs import layers_of
from flexmore_kernels.router_rows import from_embeddings, from_hidden, from_prompts
from reference import router_rows as reference

REAL = Path(__file__).parent.parent / "../shared/data/domain_embeddings"
INITS = {"prompts": from_prompts, "hidden": from_hidden}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_every_layer_s_rows(dtype):
    model, given = make_model(dtype), torch.randn(4, D) * 3
    before = bits(model)
    from_embeddings(model, given)
    for rows in rows_of(model):
        assert torch.equal(rows, given.to(dtype))
    assert_unchanged(model, before, but=["gate.weight"])


def test_embeddings_of_chosen_experts():
    model, given = make_model(), torch.randn(4, D)
    before = rows_of(model)
    from_embeddings(model, given, experts=["code", 1])
    for rows, old in zip(rows_of(model), before, strict=True):
        assert torch.equal(rows[[1, 2]], given[[1, 2]].double())
        assert torch.equal(rows[[0, 3]], old[[0, 3]])
    before = rows_of(model)
    from_embeddings(model, {"law": given[0], 2: given[3]})
    for rows, old in zip(rows_of(model), before, strict=True):
        assert torch.equal(rows[[3, 2]], given[[0, 3]].double())
        assert torch.equal(rows[[0, 1]], old[[0, 1]])


def test_embeddings_of_a_projected_router():
    model, given = projected(dtype=torch.float32), torch.randn(4, 5)
    before = bits(model)
    layer = layers_of(model)[0]
    layer.prepare()
    with torch.inference_mode():
        old = layer.gate.rows().clone()
    from_embeddings(model, given)
    for layer in layers_of(model):
        assert torch.equal(layer.gate.domain_embeddings, given)
    with torch.inference_mode():  # what was kept for serving is not stale
        assert not torch.equal(layers_of(model)[0].gate.rows(), old)
    assert_unchanged(model, before, but=["domain_embeddings"])


@pytest.mark.parametrize(
    "given, words",
    [
        (
            torch.ones(4, 256),
            "got width 256; accepted: hidden_size, 12, .*domain_embedding_size=256",
        ),
        (torch.ones(3, D), r"embeddings: got shape \(3, 12\); accepted: \(4, m\)"),
        ({"math": torch.ones(D), "code": torch.ones(D + 1)}, r"got shape \(13,\)"),
        ({"physics": torch.ones(D)}, "got 'physics'.*accepted: base, math, code, law"),
        ({"math": torch.ones(D), 1: torch.ones(D)}, "got expert 1 twice"),
        ({"math": torch.full((D,), torch.nan)}, "got NaN or Inf"),
        ({}, "embeddings: got none"),
    ],
)
def test_embeddings_that_do_not_fit(given, words):
    model = make_model()
    before = bits(model)
    with pytest.raises(ValueError, match=words):
        from_embeddings(model, given)
    assert_unchanged(model, before)


def test_embeddings_beyond_the_dtype_are_not_written():
    model = make_model(torch.float16)
    before = bits(model)
    with pytest.raises(ValueError, match="beyond float16"):
        from_embeddings(model, {1: torch.ones(D), 2: torch.full((D,), 1e5)})
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="width 12; accepted: .*domain_embedding_size, 5"):
        from_embeddings(projected(), torch.ones(4, D))


def test_a_shared_expert_s_row_is_left_alone():
    model = make_model(shared_expert=2)
    before = rows_of(model)
    from_embeddings(model, torch.randn(4, D))
    texts = some_texts()
    for rows, old in zip(rows_of(model), before, strict=True):
        assert torch.equal(rows[2], old[2]) and not (rows[[0, 1, 3]] == old[[0, 1, 3]]).any()
    before = rows_of(model)
    from_hidden(model, texts)
    for rows, old in zip(rows_of(model), before, strict=True):
        assert torch.equal(rows[2], old[2]) and not (rows[[0, 1, 3]] == old[[0, 1, 3]]).any()
    for wrong in ([2], [], ["code", 1]):
        with pytest.raises(ValueError, match=r"accepted: of \[0, 1, 3\]"):
            from_embeddings(model, torch.randn(4, D), experts=wrong)


@pytest.mark.skipif(not REAL.is_dir(), reason="the domain embeddings of FlexOlmo are not here")
def test_flexolmo_s_own_initialisation():
    given = load_embeddings(REAL)
    config = FlexMoREConfig(num_hidden_layers=1, experts=[{"name": name} for name in given])
    model = FlexMoREForCausalLM(config, device="meta")
    layers_of(model)[0].gate.to_empty(device="cpu")
    from_embeddings(model, given)
    rows = rows_of(model)[0]
    for row, vector in zip(rows, given.values(), strict=True):
        assert torch.equal(row, vector) and 0.4 < vector.norm() < 0.6  # not made of length 1
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    to_public = dict(zip(given, (unit @ unit[list(given).index("public")]).tolist(), strict=True))
    assert {name: round(cosine, 3) for name, cosine in to_public.items()} == {
        "public": 1.0, "news": 0.918, "creative": 0.858, "math": 0.782, "pes2o": 0.753,
        "code": 0.684, "reddit": 0.672,
    }  # fmt: skip


@pytest.mark.parametrize("through", ["base", "own"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_hidden_states(init, through, shared):
    model, texts = make_model(shared_expert=shared), some_texts()
    xs = {
        e: [seen(model, document, e if through == "own" else 0) for document in own]
        for e, own in texts.items()
    }
    before = bits(model)
    INITS[init](model, texts, through=through, batch=2)
    assert_unchanged(model, before, but=["gate.weight"])
    for n, rows in enumerate(rows_of(model)):
        right = reference.hidden_rows(
            [[x[n] for x in own] for own in xs.values()], init == "prompts"
        )
        skipped = int(shared)  # the base's row is not read then
        testing.assert_accurate(rows[skipped:], right[skipped:])


def test_logits_over_the_texts_have_standard_deviation_one():
    model, texts = make_model(), own_words()
    from_hidden(model, texts)
    for n, rows in enumerate(rows_of(model)):
        logits = torch.cat([seen(model, doc)[n] for own in texts.values() for doc in own]) @ rows.T
        testing.assert_accurate(logits.std(correction=0)[None], torch.ones(1).double())
        testing.assert_accurate(logits.mean(1) + 1, torch.ones(len(logits)).double())


@pytest.mark.parametrize("init", INITS)
def test_tokens_reach_their_own_expert(init):
    model, texts = make_model(hidden_size=32), own_words(documents=20)
    INITS[init](model, texts)
    rows, reached = rows_of(model)[0], []
    for e, own in own_words().items():
        x = torch.cat([seen(model, document)[0] for document in own])
        reached.append((x @ rows.T).argmax(1) == e)
    assert torch.cat(reached).double().mean() > 0.7  # by chance a quarter


def test_rows_do_not_depend_on_rows_order_names_or_grad_mode():
    model, texts = make_model(), some_texts()
    from_hidden(model, texts)
    found = rows_of(model)
    from_embeddings(model, torch.randn(4, D))
    names = {"law": texts[3], 0: texts[0], "code": texts[2], "math": texts[1]}
    with torch.inference_mode():
        from_hidden(model, names)
    assert all(map(torch.equal, rows_of(model), found))
    # Owners who swap their experts swap their rows.
    from_hidden(model, {0: texts[2], 1: texts[1], 2: texts[0], 3: texts[3]})
    for rows, old in zip(rows_of(model), found, strict=True):
        testing.assert_accurate(rows[[2, 1, 0, 3]], old)


def test_model_s_own_routing_is_another_way_through():
    model, texts = make_model(), some_texts()
    from_hidden(model, texts, through="model")
    found = rows_of(model)
    from_hidden(model, texts, through="base")
    assert torch.equal(found[0], rows_of(model)[0])  # layer 0 has no router below it
    assert not torch.allclose(found[1], rows_of(model)[1])


def test_rows_of_chosen_experts_use_the_text_of_all():
    model, texts = make_model(), some_texts()
    before = rows_of(model)
    from_hidden(model, texts)
    all_rows = rows_of(model)
    with torch.no_grad():
        for layer, old in zip(layers_of(model), before, strict=True):
            layer.gate.weight.copy_(old)
    from_hidden(model, texts, experts=["law"])
    for rows, new, old in zip(rows_of(model), all_rows, before, strict=True):
        assert torch.equal(rows[3], new[3]) and torch.equal(rows[:3], old[:3])


def test_long_documents_are_cut_and_all_of_them_is_used():
    model, texts = make_model(), some_texts((0, 1), documents=2)
    pieces = {e: [own[i : i + 4] for own in docs for i in range(0, len(own), 4)]
              for e, docs in texts.items()}  # fmt: skip
    from_hidden(model, texts, length=4)
    found = rows_of(model)
    from_hidden(model, pieces)
    for rows, again in zip(found, rows_of(model), strict=True):
        testing.assert_accurate(rows[:2], again[:2])


@pytest.mark.parametrize("init", INITS.values())
@pytest.mark.parametrize(
    "texts, words",
    [
        ({1: [[1, 2]]}, "got those of one expert"),
        ({1: [[1, 2]], 2: []}, r"\[2\]: got no document"),
        ({1: [[1, 2]], 2: [[]]}, r"\[2\]\[0\]: got no token"),
        ({1: [[1, 2]], 2: [[1, 40]]}, r"\[2\]\[0\]: got 40; accepted: an integer from 0 to 39"),
        ({1: [[1, 2]], 2: [torch.tensor([-1])]}, "accepted: ids from 0 to 39"),
        ({1: [[1, 2]], "art": [[1]]}, "got 'art'"),
        ({1: [[7, 7]], 2: [[7, 7]]}, "is alike for all experts"),
        ({}, "got none"),
    ],
)
def test_texts_that_cannot_be(init, texts, words):
    model = make_model()
    before = bits(model)
    with pytest.raises(ValueError, match=words):
        init(model, texts)
    assert_unchanged(model, before)


def test_other_bad_input():
    model, texts = make_model(), some_texts()
    for wrong in ("text", [["a"]], torch.ones(2)):
        with pytest.raises(TypeError):
            from_hidden(model, {1: wrong, 2: [[1]]})
    for change in ({"through": "all"}, {"batch": 0}, {"length": 0}, {"experts": []}):
        with pytest.raises(ValueError, match=next(iter(change))):
            from_hidden(model, texts, **change)
    with pytest.raises(ValueError, match="router='linear'; or from_embeddings, then tune"):
        from_hidden(projected(), texts)
    with pytest.raises(TypeError, match="FlexMoREForCausalLM"):
        from_embeddings(model.model.layers[0].mlp, torch.ones(4, D))
    with torch.no_grad():
        model.model.embed_tokens.weight[1, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN|not finite"):
        from_hidden(model, {1: [[1]], 2: [[2]]})
