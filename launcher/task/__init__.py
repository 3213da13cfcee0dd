"""WHAT IS LEARNED: one file per task. A task turns records into rows, rows into batches, and outputs into a loss."""
