from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import Checkpoint
from common.errors import ConfigError
from common.source import Read
from common.weight_files import INDEX


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2, 2).half(),
        "empty": torch.empty(0, 4),
    }


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.tensor(name, tensor.shape)
        assert read.dtype == tensor.dtype and read.equal(tensor)
        assert checkpoint.nbytes(name) == tensor.nbytes


def test_sharded_files_are_found_by_the_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "not-in-the-index.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensor("a").equal(tensors["a"])
    assert checkpoint.tensor("b").equal(tensors["b"])


def test_only_the_bytes_asked_for_are_read(tmp_path: Path) -> None:
    save_file({"large": torch.zeros(1 << 22), "small": torch.arange(10.0)}, tmp_path / "model.safetensors")
    before = bytes_read()
    assert Checkpoint(tmp_path).tensor("small").equal(torch.arange(10.0))
    assert bytes_read() - before < 1 << 16
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors | {"whole": torch.arange(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"tensor no\.such is missing"):
        checkpoint.tensor("no.such")
    with pytest.raises(ConfigError, match=r"tensor a has shape \[3, 5\], expected \[5, 3\]"):
        checkpoint.tensor("a", (5, 3))
    with pytest.raises(ConfigError, match="tensor whole is I64"):
        checkpoint.tensor("whole")


def test_broken_folders_are_refused_with_a_sentence(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        Checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not at all what it should be")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        Checkpoint(tmp_path)
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-8])
    cut = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="ends too early"):
        [cut.tensor(name) for name in tensors]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match=r"gone\.safetensors cannot be read: No such file"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ConfigError, match="is malformed"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},  # of the header's own bytes
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 63]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        [],
    ],
)
def test_headers_that_are_none_are_refused(tmp_path: Path, about: object) -> None:
    header = json.dumps({"a": about}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a safetensors file"):
        Checkpoint(tmp_path)


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    header = b'{"a":' * 100_000
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_eight_bits_that_are_no_matrix_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    value, scale = torch.ones(shape).to(torch.float8_e4m3fn), torch.ones(shape and (1,))
    save_file({"w": value, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="tensor w is F8_E4M3, and no matrix"):
        checkpoint.tensor("w")
    with pytest.raises(ConfigError, match="tensor w is F8_E4M3, and no matrix"):
        checkpoint.fill([Read("w", torch.empty(shape))])
