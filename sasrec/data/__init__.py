"""Interactions: readers, tables, vocabularies, sequences and training windows."""
