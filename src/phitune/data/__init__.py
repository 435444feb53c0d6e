"""Files and text to token ids and packed batches. Knows no model."""
