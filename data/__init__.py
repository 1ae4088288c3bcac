"""Texts that ship with the package; see README.md for their source and licence."""
