"""Compares the schemes by which ranks share out sampling; ``albireo bench sampling`` runs it."""
