"""Recipes for Macs of a size, as plain data: widths of the release's modules, layer by layer."""

MACS: dict[str, dict[str, str]] = {}
