"""Schemas: tables of names per model family and layout."""
