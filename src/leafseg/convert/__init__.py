"""Weights of others into our models and back: CompVis' latent-diffusion checkpoints, and released LEAF checkpoints."""

from leafseg.convert.run import ConversionReport, PartReport, convert

__all__ = ["ConversionReport", "PartReport", "convert"]
