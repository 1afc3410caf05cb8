"""From a model's next-token probabilities to a sequence."""

from companion.generate.decoding import Hypothesis, beam_search, greedy_search, length_penalty

__all__ = ["Hypothesis", "beam_search", "greedy_search", "length_penalty"]
