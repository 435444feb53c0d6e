"""From an adapter to what servers load: written, loaded again and proven the same, or removed."""
