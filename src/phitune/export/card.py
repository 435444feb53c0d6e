"""The model card: README.md of an adapter and of every export."""

from phitune.export.job import Source

CARD_FILE = "README.md"


def model_card(source: Source, format_name: str) -> str:
    return f"---\nbase_model: {source.model_name}\n---\n"
