"""`phitune check`: what is in a data set, what is wrong with it, and how much that matters."""
