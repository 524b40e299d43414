"""Machinery of the book: one family of rank-one dictionaries and what is needed to study it on real models."""
