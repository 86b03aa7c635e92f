"""Adapters whose names, numbers or ties mislead, against PEFT itself where it has an answer.

Traps: an embedding that is lm_head too; scales and sums that are not finite in the dtype they are
stored in; patterns of an adapter that was made on the decoder without its head; two adapters of one
directory name; two deltas of one weight.
"""

from __future__ import annotations

import json

import pytest

from flexmore_kernels.adapter_import import import_adapters
from flexmore_kernels.testing import assert_accurate, assert_same
from tests.peft_models import (
    FFN,
    adapt,
    dense_model,
    logits,
    stored,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense") / "base"
    dense_model().save_pretrained(directory)
    return directory


def edit(adapter, **config):
    """The adapter with other entries in its config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return adapter


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_delta_of_one_of_two_tied_matrices_is_not_averaged(tmp_path, name):
    """With PEFT it leaves the other one as it is; a tied checkpoint holds one matrix for both."""
    dense_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tied = dense_model(tie_word_embeddings=True)
    adapt(tied, tmp_path / "a", 1, target_modules=[*FFN, name])
    with pytest.raises(ValueError, match=rf'{name}.weight: the base ties .*accepted: other="drop"'):
        import_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", other="average")
    report = import_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", other="drop")
    assert [(part.kind, part.tensors) for part in report.others] == [(name, 1)]
    assert 0 < report.others[0].size == report.others[0].lost
    written, base = stored(tmp_path / "out"), stored(tmp_path / "base")
    assert "lm_head.weight" not in written
    assert_same(written["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_new_embedding_of_a_tied_base_is_of_both(tmp_path):
    dense_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tied = dense_model(tie_word_embeddings=True)
    exact, same = adapt(tied, tmp_path / "a", 1, modules_to_save=["embed_tokens"])
    import_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", other="average")
    assert_accurate(logits(tmp_path / "out", 1), exact, same)
