"""WHAT RANKS DO: one loop over two engines. Imports torch; DeepSpeed only when the plan asks for it."""
