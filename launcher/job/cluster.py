"""The machines: facts that a site can own, one YAML file per kind of node, each figure with its source."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.job.load import decode
from launcher.job.site import cluster_path, read_cluster
from launcher.job.spec import FROM_YAML, Bool, PositiveInt, Section, Text
from launcher.units import GIB

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), FROM_YAML]
# No machine reaches the upper bounds: ten times today's largest, so what is above them is in the wrong unit.
Tflops = Annotated[float, Field(gt=0, le=50_000, allow_inf_nan=False), FROM_YAML]
DeviceMemory = Annotated[float, Field(gt=0, le=4096, allow_inf_nan=False), FROM_YAML]
DeviceRate = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False), FROM_YAML]
LinkRate = Annotated[float, Field(ge=0.001, le=20_000, allow_inf_nan=False), FROM_YAML]
HostMemory = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False), FROM_YAML]
HostRate = Annotated[float, Field(gt=0, le=20_000, allow_inf_nan=False), FROM_YAML]
DiskRoom = Annotated[float, Field(gt=0, le=10_000_000, allow_inf_nan=False), FROM_YAML]
DiskRate = Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False), FROM_YAML]
Price = Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False), FROM_YAML]


class Gpu(Section):
    """One accelerator, or on a CPU cluster the share of a machine that one rank gets."""

    name: Text
    """What it is called by its maker."""
    kind: Literal["cuda", "cpu"]
    """How torch calls it."""
    memory_gib: DeviceMemory | Literal["machine"]
    """Memory that a job can allocate, in GiB; `machine`: this machine's RAM, shared by its ranks."""
    context_gib: Annotated[float, Field(ge=0, lt=100, allow_inf_nan=False), FROM_YAML]
    """Memory that the driver, the kernels' images and the communicators hold outside the allocator, in GiB."""
    bf16: Bool
    """Whether bf16 products run at full speed in hardware."""
    fp16: Bool
    """Whether fp16 products run at full speed in hardware, as fast as bf16 where that is there too."""
    peak_bf16_tflops: Tflops
    """Data sheet: dense products in bf16, and in fp16 where bf16 is missing, in 1e12 operations per second; where neither is there, what emulation reaches."""
    peak_fp32_tflops: Tflops
    """Data sheet: products in fp32 as torch runs them unless told otherwise, TF32 off, in 1e12 per second."""
    memory_gb_per_s: DeviceRate
    """Data sheet: bandwidth of its memory, in 1e9 bytes per second."""
    matmul_share: Share
    """Achievable: share of the peak that a matrix product of great width reaches."""
    matmul_half_width: Annotated[float, Field(ge=0, lt=100_000, allow_inf_nan=False), FROM_YAML]
    """Achievable: width of a model whose products reach half of `matmul_share`; products of width w reach w / (w + this)."""
    attention_share: Share
    """Achievable: share of the peak that the fused attention kernel reaches, on the half that is not masked."""
    memory_share: Share
    """Achievable: share of the bandwidth that elementwise kernels reach."""
    overlap_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), FROM_YAML]
    """Achievable: share of the collectives' time that hides behind arithmetic, when there is enough of it."""
    launch_us: Annotated[float, Field(ge=0, lt=1000, allow_inf_nan=False), FROM_YAML]
    """Achievable: time in which the host starts one kernel, in microseconds."""
    fp8_speedup: Annotated[float, Field(ge=1, lt=10, allow_inf_nan=False), FROM_YAML] | None = None
    """Achievable: how much faster than in bf16 the blocks' products are in fp8, casts counted; none without fp8 units."""

    @model_validator(mode="after")
    def _something_is_left(self) -> Gpu:
        if self.memory_gib != "machine" and self.context_gib >= self.memory_gib:
            raise ValueError(
                f"has no memory left: context_gib {self.context_gib:g} of memory_gib {self.memory_gib:g}; mend one"
            )
        if self.bf16 and self.peak_bf16_tflops < self.peak_fp32_tflops:
            raise ValueError(
                f"is slower in bf16 ({self.peak_bf16_tflops:g} TFLOP/s) than in fp32 ({self.peak_fp32_tflops:g}), though "
                "bf16 is true; mend one, or set bf16 to false"
            )
        return self


class Link(Section):
    """How ranks are joined."""

    intra_node_gb_per_s: LinkRate
    """Bandwidth between two ranks of a node, one direction, in 1e9 bytes per second."""
    inter_node_gb_per_s: LinkRate
    """Bandwidth of a node's network per rank, one direction, in 1e9 bytes per second."""
    link_share: Share
    """Achievable: share of those bandwidths that large collectives reach."""
    latency_us: Annotated[float, Field(ge=0, lt=100_000, allow_inf_nan=False), FROM_YAML]
    """Achievable: time that a collective within a node takes however small it is, in microseconds; further nodes add theirs."""


class Host(Section):
    """The node around its accelerators: where states are offloaded to and checkpoints written."""

    memory_gib: HostMemory | Literal["machine"]
    """RAM of a node, in GiB; `machine`: this machine's."""
    memory_gb_per_s: HostRate
    """Data sheet: bandwidth of the RAM of a node, in 1e9 bytes per second; an optimiser on the host is bound by it."""
    device_gb_per_s: HostRate
    """Achievable: copies between host and one accelerator, one direction, all accelerators at once, in 1e9 bytes per second."""
    disk_gb_per_s: DiskRate
    """Achievable: writing a checkpoint from one node, in 1e9 bytes per second."""
    nvme_gib: DiskRoom | None = None
    """Room on the local NVMe disks of a node, in GiB; none, no offload to NVMe."""
    nvme_gb_per_s: DiskRate | None = None
    """Achievable: reading or writing those disks together, in 1e9 bytes per second."""

    @model_validator(mode="after")
    def _room_and_rate(self) -> Host:
        if (self.nvme_gib is None) != (self.nvme_gb_per_s is None):
            raise ValueError("has one of `nvme_gib` and `nvme_gb_per_s` without the other; give both or none")
        return self


OneLine = Annotated[Text, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
TimeLimit = Annotated[Text, Field(pattern=r"^(UNLIMITED|[0-9]+(-[0-9]+)?(:[0-9]+){0,2})$")]
SbatchOption = Annotated[OneLine, Field(pattern=r"^--?[A-Za-z]")]


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
ScratchPath = Annotated[Text, Field(pattern=r"^/[A-Za-z0-9_./${}-]*$")]


class Container(Section):
    """The image that ranks run in. The job's paths must be visible inside under their own names."""

    image: OneLine
    """For pyxis what `--container-image` takes, for apptainer the path of a .sif."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """`pyxis`: Slurm's plug-in, options of srun; `apptainer`: a command."""
    mounts: tuple[OneLine, ...] = ()
    """`source:target`, or a folder under its own name."""
    python: OneLine = "python3"
    """Interpreter inside the image, with fleetune's packages."""
    launcher: OneLine | None = None
    """fleetune's folder `launcher` inside the image; left out, the one that wrote the script, which must be mounted."""


class SlurmSite(Section):
    """How jobs are asked for here. Nothing is needed: what is left out is left to Slurm's own defaults."""

    partition: OneLine | None = None
    """Partition (queue) to run in."""
    account: OneLine | None = None
    """Account that is charged."""
    qos: OneLine | None = None
    """Quality of service."""
    constraint: OneLine | None = None
    """Features that the nodes must have, such as `h100&ib`."""
    time: TimeLimit = "24:00:00"
    """Time limit as Slurm writes it, in quotes, since YAML reads 24:00:00 as the number 86400."""
    gpus_directive: Literal["gpus-per-node", "gres", "none"] | None = None
    """How accelerators are asked for: `--gpus-per-node=N`, `--gres=gpu:N` or not at all; left out, the first for CUDA and the last for CPU."""
    gpu_type: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Kind of accelerator where a node type has a name for it: `h100` asks for `gpu:h100:N`."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores of a node's single task, which starts all of its ranks; left out, one per rank."""
    mem: OneLine | None = None
    """Host memory per node with its unit, in quotes: "0" asks for all of it."""
    extra: tuple[SbatchOption, ...] = ()
    """Further `#SBATCH` options, each as it would be written there, such as `--exclusive`; a later option wins."""
    modules: tuple[OneLine, ...] = ()
    """Environment modules to load, in order."""
    venv: OneLine | None = None
    """Folder of a Python environment seen by all nodes, activated and used; left out, the interpreter that wrote the script."""
    container: Container | None = None
    """Image to run in."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Variables for all ranks, such as `NCCL_SOCKET_IFNAME: ib0`; no secrets, since the script is a file."""
    scratch: ScratchPath | None = None
    """Folder on a local disk of every node, made there and used as TMPDIR: `/local/${SLURM_JOB_ID}`."""
    setup: tuple[Text, ...] = ()
    """Shell lines of the site's own, run on the first node before anything else: `source /opt/site/env.sh`."""
    prolog: tuple[Text, ...] = ()
    """Shell lines run on the first node right before the ranks start."""
    epilog: tuple[Text, ...] = ()
    """Shell lines run on the first node when the ranks have left, however they did; `$code` is the exit code."""

    @model_validator(mode="after")
    def _one_python(self) -> SlurmSite:
        if self.venv is not None and self.container is not None:
            raise ValueError("has both `venv` and `container`; name the interpreter inside as container.python")
        if secret := [name for name in self.environment if _SECRET_NAME.search(name)]:
            raise ValueError(
                f"would write {secret[0]} into a file; set it in the shell that submits, and name it in launch.environment"
            )
        return self


_SECRET_NAME = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE", re.IGNORECASE)


_NAMES = {"gpu.name", "gpu.kind"}  # the rest are figures


class KubernetesSite(Section):
    """How these machines are asked for from Kubeflow."""

    kind: Literal["TrainJob", "PyTorchJob"] = "TrainJob"
    """Kubeflow Trainer's v2 or the Training Operator's v1."""
    image: OneLine | None = None
    """Image with fleetune and its packages; needed."""
    namespace: Annotated[Text, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")] = "default"
    """Where the job is made."""
    runtime: OneLine = "torch-distributed"
    """TrainJob: the ClusterTrainingRuntime that it refers to."""
    python: OneLine = "python3"
    """Interpreter inside the image."""
    launcher: OneLine = "/opt/fleetune/launcher"
    """fleetune's folder `launcher` inside the image."""
    claims: dict[OneLine, OneLine] = Field(default_factory=dict)
    """PersistentVolumeClaims by name and where they are mounted; spec, data and output folder must lie on them."""
    gpu_resource: OneLine = "nvidia.com/gpu"
    """What an accelerator is called among a node's resources."""


class Cluster(Section):
    """Facts of a homogeneous cluster. `sources` names where every figure of `gpu`, `link` and `host` comes from."""

    gpu: Gpu
    """The accelerator."""
    link: Link
    """The interconnect."""
    host: Host
    """The node around them."""
    price_per_gpu_hour: Price | None = None
    """What an accelerator costs per hour, in `currency`."""
    currency: OneLine = "USD"
    """Of the price."""
    sources: dict[str, str]
    """For each figure, `gpu.memory_gib` say: where it was read or how it was measured."""
    slurm: SlurmSite = SlurmSite()
    """How this site's Slurm is asked for these machines."""
    kubernetes: KubernetesSite = KubernetesSite()
    """How this site's Kubernetes is."""

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Cluster:
        sections: dict[str, Section] = {"gpu": self.gpu, "link": self.link, "host": self.host}
        keys: dict[str, tuple[Section, str]] = {
            f"{section}.{key}": (facts, key) for section, facts in sections.items() for key in type(facts).model_fields
        }
        keys["price_per_gpu_hour"] = (self, "price_per_gpu_hour")
        figures = {dotted for dotted, (facts, key) in keys.items() if getattr(facts, key) is not None} - _NAMES
        if missing := sorted(figures - {dotted for dotted, words in self.sources.items() if words.strip()}):
            raise ValueError(f"`sources` says nothing of {', '.join(missing)}; add where each was read or measured")
        if unknown := sorted(set(self.sources) - set(keys)):
            raise ValueError(
                f"`sources` speaks of {', '.join(unknown)}, which is no figure; mend the name, or remove it"
            )
        return self

    def memory_bytes_per_rank(self, ranks_per_node: int) -> int:
        """What a rank may use, in bytes, the context taken off; 0 where nothing is left."""
        if self.gpu.memory_gib == "machine":
            return max(0, machine_memory_bytes() // ranks_per_node - int(self.gpu.context_gib * GIB))
        return int((self.gpu.memory_gib - self.gpu.context_gib) * GIB)

    def host_bytes_per_node(self) -> int:
        """RAM of a node, in bytes."""
        return machine_memory_bytes() if self.host.memory_gib == "machine" else int(self.host.memory_gib * GIB)


def machine_memory_bytes() -> int:
    """RAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_cluster(name: str) -> Cluster:
    """Facts of a cluster by the name of a file in `slurm/clusters/` or by path; raises `SpecError`."""
    path = cluster_path(name, "cluster.name", Path())
    return decode(Cluster, read_cluster(path), prefix=f"{path}: ")
