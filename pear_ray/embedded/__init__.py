"""Tiny models that ship with the package, so that every stage runs without a download."""

from pear_ray.embedded.paths import EMBEDDED_NAMES, embedded_path

__all__ = ["EMBEDDED_NAMES", "embedded_path"]
