"""WHAT BECOMES OF A START: nodes compare before they begin, the first failure is found, and what follows is decided. No torch."""
