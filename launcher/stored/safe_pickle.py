"""Unpickles what checkpoints contain and refuses everything else.

A pickle may name any function of any module and have it called. The unpickler here knows a short list of names, none
of which acts on the world: data classes of torch and DeepSpeed become inert records, tensors become `StoredTensor`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.records import DAMAGED, USE_ANOTHER, Storage, StoredBytes, StoredTensor


class Inert:
    """Stands for an object of another library's class: its state becomes attributes, nothing of it runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.__dict__.update(kwargs)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def _enum_value(value: Any) -> Any:
    return value


def _discard(*_: Any) -> None:
    return None


def _storage_dtypes() -> dict[tuple[str, str], Any]:
    """The storage classes that `torch.save` names, as dtypes: `torch.FloatStorage` -> float32."""
    names = {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }  # fmt: skip
    return {("torch", f"{name}Storage"): dtype for name, dtype in names.items()}


def _dtype_names() -> dict[tuple[str, str], Any]:
    found = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return {("torch", name): value for name, value in found.items()}


class UntypedStorage:
    """Marks the storage class whose elements are bytes."""


def _tensor_v2(storage: Storage, offset: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    assert storage.dtype is not None
    return _tensor(storage, storage.dtype, offset, shape, stride)


def _tensor_v3(
    storage: Storage, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: torch.dtype, *_: Any
) -> StoredTensor:
    return _tensor(storage, dtype, offset, shape, stride)


def _tensor(storage: Storage, dtype: torch.dtype, offset: int, shape: Any, stride: Any) -> StoredTensor:
    tensor = StoredTensor(storage.record, dtype, tuple(shape), tuple(stride), offset)
    inside = min((offset, *tensor.shape, *tensor.stride)) >= 0
    if not inside or (offset + tensor.span) * dtype.itemsize > storage.record.num_bytes:
        raise CheckpointError(str(storage.record.file), ABSENT, DAMAGED, USE_ANOTHER)
    return tensor


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(rebuild: Any, _kind: Any, args: Any, _attributes: Any) -> Any:
    """A tensor with attributes of its own (DeepSpeed's flat groups carry `ds_id`); the attributes are dropped."""
    return rebuild(*args)


DCP = "torch.distributed.checkpoint"

ALLOWED: dict[tuple[str, str], Any] = {
    **_dtype_names(),
    **_storage_dtypes(),
    ("torch.storage", "UntypedStorage"): UntypedStorage,
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Tensor"): Inert,
    ("torch.nn.parameter", "Parameter"): Inert,
    ("torch", "Size"): tuple,
    ("torch", "device"): Inert,
    ("torch.serialization", "_get_layout"): _discard,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("pathlib", "PosixPath"): Inert,
    ("pathlib._local", "PosixPath"): Inert,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _enum_value,
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): Inert,
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): Inert,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): Inert,
    **{
        (f"{DCP}.metadata", name): Inert
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta",
        )
    },
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"): _enum_value,
    (f"{DCP}.filesystem", "_StorageInfo"): Inert,
    (f"{DCP}.filesystem", "_StoragePrefix"): Inert,
}  # fmt: skip
"""(module, name) in the pickle -> what is used in its place. Found by reading real files of DeepSpeed and DCP."""


_TRUSTED: ContextVar[Callable[[str], None] | None] = ContextVar("trusted", default=None)


@contextmanager
def trusting(tell: Callable[[str], None]) -> Iterator[None]:
    """In here names that are not allowed are imported and run, after `tell` was given each of them."""
    token = _TRUSTED.set(tell)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


class SafeUnpickler(pickle.Unpickler):
    """Knows the names of `ALLOWED` and nothing else; storages come from `records` by their key."""

    def __init__(self, stream: Any, file: Path, records: dict[str, StoredBytes] | None = None) -> None:
        super().__init__(stream)
        self.file, self.records = file, records or {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if (tell := _TRUSTED.get()) is not None:
            tell(f"{module}.{name}")
            return super().find_class(module, name)
        raise CheckpointError(
            str(self.file),
            f"{module}.{name}",
            "is not among the classes that a checkpoint may name, so nothing of this file was run",
            "if you trust the file, save it again with tensors, numbers, strings, lists and dicts only",
        )

    def persistent_load(self, pid: Any) -> Storage:
        """`("storage", class, key, location, number of elements)`, as torch.save writes it."""
        _, kind, key, _, _ = pid
        if key not in self.records:
            raise CheckpointError(str(self.file), f"data/{key}", "is a storage that is not in the file", USE_ANOTHER)
        return Storage(self.records[key], None if kind is UntypedStorage else kind)


# What a damaged pickle raises, from the opcodes (pickle.UnpicklingError) to the constructors called with wrong values.
MALFORMED = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, AssertionError,
    UnicodeDecodeError, MemoryError, OverflowError, ImportError,
)  # fmt: skip


def unpickle(stream: Any, file: Path, records: dict[str, StoredBytes] | None = None) -> Any:
    """The object in a pickle, with `Inert` and `StoredTensor` for what would otherwise be live objects."""
    with damage_named(file):
        return SafeUnpickler(stream, file, records).load()


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Metadata of another shape than expected is damage to `path`; it is not worth a check of every field."""
    try:
        yield
    except MALFORMED as error:
        raise CheckpointError(str(path), ABSENT, DAMAGED, USE_ANOTHER) from error
