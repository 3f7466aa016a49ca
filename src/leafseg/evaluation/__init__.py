"""Metrics, intervals and evaluation of any segmenter at the original resolution."""
