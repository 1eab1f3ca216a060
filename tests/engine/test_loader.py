"""Checkpoints read from disk: what is right arrives bit for bit, what is wrong is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import Device, EngineConfig
from engine.errors import CheckpointError
from engine.loader import WeightSource
from engine.runner import Runner
from engine.tensor_file import TensorFile
from tests.engine.checkpoints import Shape, make

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4) / 7,
    "b": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)),
    "c": torch.randn(6, generator=torch.Generator().manual_seed(2)),
}


def single(directory: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    save_file(tensors, directory / "model.safetensors")
    return directory


def sharded(directory: Path) -> Path:
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, directory / "one.safetensors")
    save_file({"b": TENSORS["b"]}, directory / "two.safetensors")
    write_index(directory, {"a": "one.safetensors", "c": "one.safetensors", "b": "two.safetensors"})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("layout", [single, sharded])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_reads_what_was_written(
    layout: Callable[[Path], Path], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    progress: list[float] = []
    source = WeightSource(layout(tmp_path), dtype, on_progress=progress.append)
    merged = source.take_rows(["b", "a"], [(5, 4), (3, 4)])
    vector = source.take("c", [6])
    source.finish()
    wanted = dtype or torch.float32
    assert merged.dtype == vector.dtype == source.dtype == wanted
    assert torch.equal(merged, torch.cat((TENSORS["b"], TENSORS["a"])).to(wanted))
    assert torch.equal(vector, TENSORS["c"].to(wanted))
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_reads_tensors_as_stored_in_pieces(tmp_path: Path) -> None:
    large = torch.randn(3, 200_001, generator=torch.Generator().manual_seed(3))
    tensors = {"h": large.half(), "f": large.bfloat16(), "s": large, "e": torch.empty(0, 4)}
    file = TensorFile(single(tmp_path, tensors) / "model.safetensors")
    for name, tensor in tensors.items():
        assert file.dtype(name) == tensor.dtype
        pieces = [piece.clone() for piece in file.chunks(name)]
        assert len(pieces) == (0 if name == "e" else 3)
        assert torch.equal(torch.cat([*pieces, tensor.new_empty(0)]), tensor.flatten())
        whole = torch.empty_like(tensor)
        for piece in file.chunks(name, whole):
            assert piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert torch.equal(whole, tensor)
    for dtype in (torch.float32, torch.float16):
        source = WeightSource(tmp_path, dtype)
        assert torch.equal(source.take("s", [3, 200_001]), large.to(dtype))


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    source = WeightSource(single(tmp_path))
    os.truncate(tmp_path / "model.safetensors", 300)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        source.take_rows(["a", "b"], [[3, 4], [5, 4]])


def test_a_file_that_is_replaced_stays_the_same(tmp_path: Path) -> None:
    source = WeightSource(single(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    single(tmp_path, {"a": torch.zeros(3, 4)})
    assert torch.equal(source.take("a", [3, 4]), TENSORS["a"])


def test_a_tensor_may_be_taken_twice(tmp_path: Path) -> None:
    source = WeightSource(single(tmp_path))
    assert torch.equal(source.take("a", [3, 4]), source.take("a", [3, 4]))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.take("d", [2]), r"tensor d \[2\] is missing"),
        (
            lambda s: s.take("a", [4, 3]),
            r"model.safetensors: tensor a has shape \[3, 4\].*\[4, 3\]",
        ),
        (lambda s: s.finish(), "tensors that the model does not have: a, b, c;"),
    ],
)
def test_tensors_that_do_not_fit(
    act: Callable[[WeightSource], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        act(WeightSource(single(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    bad = TENSORS["a"].clone()
    bad[1, 2] = value
    source = WeightSource(single(tmp_path, {"a": bad}))
    with pytest.raises(CheckpointError, match="tensor a holds values that are not finite"):
        source.take("a", [3, 4])


def test_refuses_values_too_large_for_the_wanted_type(tmp_path: Path) -> None:
    source = WeightSource(single(tmp_path, {"a": TENSORS["a"] * 1e6}), torch.float16)
    with pytest.raises(CheckpointError, match=r"not finite as torch\.float16"):
        source.take("a", [3, 4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_refuses_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    source = WeightSource(single(tmp_path, {"a": TENSORS["a"].to(dtype)}))
    with pytest.raises(CheckpointError, match="tensor a is stored as"):
        source.take("a", [3, 4])


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def with_header(path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "last byte missing": (lambda p: truncate(p, p.stat().st_size - 1), "is truncated: tensor"),
    "half": (lambda p: truncate(p, p.stat().st_size // 2), "truncated"),
    "header cut": (lambda p: truncate(p, 40), "truncated: its header would be"),
    "seven bytes": (lambda p: truncate(p, 7), "truncated"),
    "empty": (lambda p: truncate(p, 0), "truncated"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 64), "not a safetensors file"),
    "not JSON": (lambda p: p.write_bytes((5).to_bytes(8, "little") + b"hello"), "not valid JSON"),
    "a list": (lambda p: with_header(p, [1]), "must be a JSON object"),
    "no offsets": (lambda p: with_header(p, {"a": {"dtype": "F32", "shape": []}}), "malformed"),
    "negative": (lambda p: with_header(p, {"a": ENTRY | {"shape": [-2]}}), "malformed"),
    "unknown type": (lambda p: with_header(p, {"a": ENTRY | {"dtype": "X"}}), "malformed"),
    "wrong size": (lambda p: with_header(p, {"a": ENTRY | {"shape": [3]}}), "but has 8 bytes"),
    "backwards": (lambda p: with_header(p, {"a": ENTRY | {"data_offsets": [8, 0]}}), "-8 bytes"),
    "pickle": (lambda p: p.write_bytes(b"\x80\x04\x95\x00\x00\x00\x00\x00\x00."), "truncated"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    path = single(tmp_path) / "model.safetensors"
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        WeightSource(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "three.safetensors"}, "three.safetensors, a part of the weights, does not exist"),
        ({"a": "../one.safetensors"}, "must be a file name"),
        ({"a": "/etc/passwd"}, "must be a file name"),
        ({"a": ""}, "must be a file name"),
        ({"a": 3}, "must be a file name"),
        ({"b": "one.safetensors"}, "puts tensor b in one.safetensors, which does not hold it"),
        ({}, "weight_map must be an object"),
        ([], "weight_map must be an object"),
        (None, "weight_map must be an object"),
    ],
)
def test_bad_index(weight_map: object, message: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        WeightSource(tmp_path)


def test_index_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is not valid JSON"):
        WeightSource(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin, which are not read"):
        WeightSource(tmp_path)


# The same through the front door: a whole checkpoint with one thing wrong.


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda p: edit(p, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"tensor model.layers.1.mlp.up_proj.weight \[80, 48\] is missing",
    ),
    "missing head": (
        lambda p: edit_config(p, tie_word_embeddings=False),
        "tensor lm_head.weight .* is missing",
    ),
    "one more layer": (
        lambda p: edit_config(p, num_hidden_layers=2),
        "model does not have: model.layers.2.input_layernorm.weight",
    ),
    "other width": (
        lambda p: edit_config(p, hidden_size=50),
        r"embed_tokens.weight has shape \[131, 48\]; by config.json it must be \[131, 50\]",
    ),
    "not a number": (
        lambda p: edit(p, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight holds values that are not finite",
    ),
    "truncated": (
        lambda p: truncate(p / "model.safetensors", 20_000),
        "is truncated",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "holds neither"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(name: str, tmp_path: Path) -> None:
    damage, message = BROKEN[name]
    path, _ = make(tmp_path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        Runner(EngineConfig(model=str(path), device=Device.CPU, num_threads=1))


def test_missing_shard(tmp_path: Path) -> None:
    path, _ = make(tmp_path, Shape(max_shard_size="60KB"))
    shard = sorted(path.glob("model-0*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}, a part of the weights, does not"):
        Runner(EngineConfig(model=str(path), device=Device.CPU, num_threads=1))


PEAK = """
import sys, torch
from pathlib import Path
from engine.loader import WeightSource

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

source = WeightSource(Path(sys.argv[1]))
before = peak()
kept = [source.take(f"t{i}", [1024, 1024]) for i in range(32)]
print((peak() - before) / sum(t.nbytes for t in kept))
"""


def test_memory_peaks_near_the_size_of_the_model(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    single(tmp_path, {f"t{i}": torch.randn(1024, 1024) for i in range(32)})  # 128 MiB
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(run.stdout) < 1.25
