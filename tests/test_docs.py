"""The guides of docs/, run as they are written: commands and Python, on small models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from flexmore_kernels import cli
from flexmore_kernels.checkpoint import make_demo_checkpoint
from flexmore_kernels.checkpoint_edit import drop
from flexmore_kernels.domain_embedding import save_embeddings
from tests.members import RANKS as MEMBERS
from tests.members import make_checkpoint, make_dense

DOCS = Path(__file__).parent.parent / "docs"
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


def flexolmo(transformers):
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.FlexOlmoConfig(**SIZES, num_experts=4, num_experts_per_tok=2)
    model = transformers.FlexOlmoForCausalLM(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if ".experts." in name:  # they all grew from expert 0
                weights[1:] = weights[0] + 0.3 * weights[1:]
    model.save_pretrained("FlexOlmo-7x7B")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Low rank means less."], trainer)
    tokenizer.save("FlexOlmo-7x7B/tokenizer.json")
    Path("text.txt").write_text("Low rank means less to read.\n" * 50)


def adapters(transformers):
    peft = pytest.importorskip("peft")
    transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES)).save_pretrained("OLMo-2")
    for name, rank in (("math", 4), ("code", 8)):
        base = transformers.Olmo2ForCausalLM.from_pretrained("OLMo-2")
        what = ["gate_proj", "up_proj", "down_proj"]
        options = {"r": rank, "target_modules": what, "init_lora_weights": False}  # B is not zero
        model = peft.get_peft_model(base, peft.LoraConfig(**options))
        model.save_pretrained(f"lora-{name}")


TEXTS = {
    "public": "The cat sat.\n\nIt slept.",
    "math": "1 + 1 = 2\n\n3 * 7 = 21",
    "code": "def f(x):\n    return x\n\nfor i in y: pass",
}


def routers(_):
    tokenizers = pytest.importorskip("tokenizers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "vocab_size": 300}
    make_demo_checkpoint("mixture", **sizes, top_k=3, expert_ranks=(0, 4, 8))
    path = Path("mixture/config.json")
    cards = [{"name": name} for name in ("base", "math", "code")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experts": cards}))
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save("mixture/tokenizer.json")
    Path("text").mkdir()
    for name, text in TEXTS.items():
        Path(f"text/{name}.txt").write_text(text)


def life_of_a_mixture(_):
    make_checkpoint(Path("whole"), (*MEMBERS, 3))
    drop("whole", [4], "mixture")
    drop("whole", [1, 2, 3], "pair")
    names = ("dense-law", "dense-code", "dense-math")
    for seed, name in enumerate(("seed", *names)):
        make_dense(Path(name), seed)
    save_embeddings("domains.safetensors", {name: torch.randn(8) for name in names})


GUIDES = {
    "from_flexolmo": flexolmo,
    "adapters": adapters,
    "routers": routers,
    "life_of_a_mixture": life_of_a_mixture,
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_guide(make, request, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5.17")
    monkeypatch.chdir(tmp_path)
    make(transformers)
    text = (DOCS / f"{request.node.callspec.id}.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    blocks = [each for each in blocks if each[0] != "console"]  # test_hf_serve.py runs those
    assert {kind for kind, _ in blocks} == {"sh", "python"}
    names = {"torch": torch}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "guide", "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "flexmore" and cli.main(arguments) == 0, line
