"""What a fine-tune changed, in numbers: base and tuned model measured side by side."""
