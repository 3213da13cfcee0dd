"""WHAT IS ASKED: the job spec, how it is read, and the facts of the cluster it names. No torch, no numpy."""

from launcher.job.cluster import Cluster, Gpu, Link, SlurmSite, load_cluster
from launcher.job.load import load_spec, parse_spec
from launcher.job.spec import JobSpec

__all__ = ["Cluster", "Gpu", "JobSpec", "Link", "SlurmSite", "load_cluster", "load_spec", "parse_spec"]
