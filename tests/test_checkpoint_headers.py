"""Headers of safetensors files that are not what they say, and zero rank rows at the end of pairs.

Traps: a file cut anywhere, offsets that point elsewhere, negative zeros, a factor that is zero on
one side only, several shards missing.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from flexmore_kernels import checkpoint
from flexmore_kernels.checkpoint_headers import ZeroTails, read_header
from flexmore_kernels.checkpoint_layout import read_layout

EXPERT = "model.layers.1.mlp.experts.1."


@pytest.fixture
def directory(tmp_path):
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", hidden_size=16, intermediate_size=24, num_layers=2, top_k=2,
        vocab_size=11, expert_ranks=(0, 3, 0),
    )  # fmt: skip
    return tmp_path / "made"


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_truncated_file_is_named(directory, keep):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="truncated in"):
        checkpoint.load_model(directory)


def test_trailing_bytes_and_rubbish(directory):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 8)
    with pytest.raises(ValueError, match="8 bytes after"):
        read_layout(directory)
    path.write_bytes(data[:8] + b"?" * (len(data) - 8))
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_layout(directory)


@pytest.mark.parametrize("fault", ["overlap", "negative", "letters"])
def test_header_that_points_elsewhere(directory, fault):
    path, name = directory / "model.safetensors", f"{EXPERT}up_proj_b.weight"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin, end = header[name]["data_offsets"]
    size = end - begin
    moved = {"overlap": [0, size], "negative": [-size, 0], "letters": ["0", str(size)]}
    header[name]["data_offsets"] = moved[fault]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match=r"at byte|not a safetensors file"):
        read_layout(directory)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [((), (), 0), ((4,), (), 0), ((), (4,), 0), ((4,), (4,), 1), ((2, 3, 4), (3, 4), 2),
     ((3, 4), (0, 1, 2, 3, 4), 2), ((1, 2), (1, 2), 0), (range(5), range(5), 5)],
)  # fmt: skip
def test_zero_tail_needs_both_sides(tmp_path, dtype, rows, columns, count):
    a, b = torch.ones(5, 3, dtype=dtype), torch.ones(4, 5, dtype=dtype)
    a[list(rows)] = -0.0
    b[:, list(columns)] = 0.0
    odd = torch.ones(1, dtype=torch.bfloat16)  # so that the others begin at no multiple of 4
    save_file({"a": a, "b": b, "odd": odd}, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert ZeroTails(tmp_path).count(found["a"], found["b"]) == count


def test_every_missing_shard_is_named(directory, tmp_path):
    layout = read_layout(directory)
    tensors = checkpoint.read_tensors(layout)
    checkpoint.save_checkpoint(tmp_path / "split", tensors, layout.config, max_file_bytes=4000)
    files = sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    for file in files[1:3]:
        (tmp_path / "split" / file).unlink()
    with pytest.raises(ValueError, match=f"{files[1]}, {files[2]}: missing .* 2 of {len(files)}"):
        read_layout(tmp_path / "split")
