"""From one checkpoint format to another: opened as a `State`, planned as files, copied in stretches, put in place whole."""
