"""phitune check: reads the data and reports on it."""
