"""The loop that trains an adapter, and the run directory it writes."""
