"""Trained models as graphs for other runtimes, with what the change costs measured."""
