"""Smaller and faster versions of a bundle, within a loss that is stated beforehand."""
