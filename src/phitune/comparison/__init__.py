"""What people and machines see of a comparison: a terminal, a page, JSON."""
