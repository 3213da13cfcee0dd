"""What a measurement yields, as it travels from the ranks that measured to the file that is written. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One figure: the median of its repetitions, and how far they lie apart."""

    value: float
    """FLOP/s, bytes/s or seconds, as the field that holds it says."""
    spread: float
    """(largest - smallest) / median, a fraction."""
    repetitions: int

    def words(self) -> str:
        return f"{self.repetitions} repetitions, spread {self.spread:.0%}"


@dataclass(frozen=True)
class Machine:
    """Everything measured on one node. Rates are of one rank while all ranks of the node work alike."""

    name: str
    """What torch calls the accelerator; of a CPU, its model."""
    kind: str
    """`cuda` or `cpu`."""
    num_ranks: int
    threads: int
    """Cores that a rank used."""
    torch_version: str
    cores: int
    host_memory_bytes: int
    device_memory_bytes: int | None
    """Memory that torch reports; None on a CPU, whose ranks share the host's."""
    context_bytes: int
    """Held outside torch's allocator: on a CPU the libraries, on CUDA the driver, its kernels and the communicators."""
    products: dict[str, dict[int, Sample]]
    """FLOP/s of the three products of a linear layer, by precision and width."""
    attention: dict[str, Sample]
    """FLOP/s of causal attention forward and backward, of the unmasked half, by precision."""
    add: Sample
    """Bytes/s of an addition of two large tensors, both read and the sum written."""
    copy: Sample
    """Bytes/s of a copy on the device, read and written."""
    launch: Sample
    """Seconds from one tiny kernel to the next."""
    to_device: Sample
    """Bytes/s from pinned host memory."""
    to_host: Sample
    """Bytes/s into pinned host memory."""
    host_add: Sample
    """Bytes/s of the same addition in host memory, all ranks together."""
    disk_write: Sample
    """Bytes/s to a file, until it is on the disk."""
    disk_read: Sample
    """Bytes/s from that file, its pages dropped from memory before where the system allows it."""
    gather: Sample | None = None
    """Bytes/s that a rank sends in a large all-gather; None with one rank."""
    latency: Sample | None = None
    """Seconds of an all-reduce of one number."""
    overlap: Sample | None = None
    """Share of a collective's time that hides behind products, a fraction."""
    nvme: Sample | None = None
    """Bytes/s of the slower of writing and reading in the NVMe folder, where one was named."""
    nvme_bytes: int | None = None
    """Room in that folder."""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Machine:
        by_precision = {
            precision: {int(width): Sample(**sample) for width, sample in widths.items()}
            for precision, widths in raw["products"].items()
        }
        attention = {precision: Sample(**sample) for precision, sample in raw["attention"].items()}
        samples = {
            key: Sample(**value) for key, value in raw.items() if isinstance(value, dict) and set(value) == _SAMPLE_KEYS
        }
        return cls(**{**raw, **samples, "products": by_precision, "attention": attention})


_SAMPLE_KEYS = {"value", "spread", "repetitions"}
