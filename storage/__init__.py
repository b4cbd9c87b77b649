"""Samples, corpora and the soft-target dataset. Imports nothing of the other rooms."""
