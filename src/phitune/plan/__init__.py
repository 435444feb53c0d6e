"""Memory and time before a run: arithmetic only, without torch."""
