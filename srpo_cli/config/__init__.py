"""Typed, validated configuration, and the presets that it is read from."""
