"""Plugins found by name, formats recognised, families asked for."""
