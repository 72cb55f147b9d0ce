"""itune: tune a language model to follow instructions, and prove that it got better."""

__version__ = "0.1.0"
