"""One module for each command: `run` parses its flags and calls one function."""
