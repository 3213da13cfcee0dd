"""fleetune: one job spec in, a fine-tuned model out. The sub-packages are the pipeline, in order."""

__version__ = "0.1.0"
