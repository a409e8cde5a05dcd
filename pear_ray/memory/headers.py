"""Shapes and dtypes of the tensors in a model folder, from the heads of its safetensors files."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from pear_ray.errors import InputError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Not parameters: buffers that old checkpoints carry along.
BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file describes it; `dtype` is safetensors' name, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every parameter in `folder` by name; none where it holds no safetensors, or not all of them.

    Only the heads of the files are read: a file begins with the length of a JSON object, in eight
    bytes, and with that object (https://huggingface.co/docs/safetensors).

    Raises:
        InputError: A file, or the index, is not what it should be.
    """
    found: dict[str, TensorHeader] = {}
    for file in _files(folder):
        for name, entry in _header(file).items():
            if name == "__metadata__" or name.endswith(BUFFERS):
                continue
            try:
                begin, end = entry["data_offsets"]
                found[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]), end - begin)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file}: tensor {name!r} has no usable header entry") from error
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index ({error}); save it again") from error
    files = [folder / name for name in sorted(names)]
    if any(not file.exists() for file in files):
        return []  # what a download of the small files alone leaves
    return files


def _header(file: Path) -> dict[str, dict]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{file}: a header of {length} bytes; this is not safetensors")
            tree = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{file}: not a safetensors file ({error}); save it again") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: its header is no object; this is not safetensors")
    return tree
