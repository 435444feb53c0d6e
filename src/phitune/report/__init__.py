"""What a person should know about a data set before training. Loads no model and no torch."""
