"""`phitune layers`: what a model is made of, and which layers the user's data would change most."""
