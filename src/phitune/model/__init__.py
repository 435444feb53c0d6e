"""The Phi decoders, their weights and their adapters. Knows no text."""
