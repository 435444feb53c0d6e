"""An OpenAI-compatible HTTP server for one base model and its adapters."""
