"""The stages of a run. Each does only what is missing, so that the same command can be typed again at any time."""
