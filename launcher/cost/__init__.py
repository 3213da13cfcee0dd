"""WHAT A MODEL COSTS: any transformers config -> `ModelCost`, measured on the real modules without memory, cached as JSON.

The values and the cache are pure; `measure.py` alone imports torch, and runs in a process of its own.
"""

from launcher.cost.values import Flops, LinearInBatch, ModelCost, PeakBytes, SavedBytes

__all__ = ["Flops", "LinearInBatch", "ModelCost", "PeakBytes", "SavedBytes"]
