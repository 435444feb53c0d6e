"""What several test files share: small models, adapters, rows and runs."""
