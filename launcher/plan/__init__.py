"""WHAT WE DECIDE: (JobSpec, ModelCost, Cluster) -> Plan. Pure arithmetic: no torch, no numpy, no files."""

from launcher.plan.decide import make_plan
from launcher.plan.layout import Layout
from launcher.plan.values import Candidate, Item, Memory, Plan, Rejected, StepTime, TimeItem

__all__ = ["Candidate", "Item", "Layout", "Memory", "Plan", "Rejected", "StepTime", "TimeItem", "make_plan"]
