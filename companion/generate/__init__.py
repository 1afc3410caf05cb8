"""From a model's next-token probabilities to a sequence."""

from companion.generate.constrain import Copying, OneOf
from companion.generate.decoding import Hypothesis, beam_search, greedy_search, length_penalty
from companion.generate.sampling import (
    generate,
    min_p,
    repetition_penalty,
    sample,
    temperature,
    top_k,
    top_p,
    typical,
)
from companion.generate.speculative import (
    ModelDrafter,
    PromptLookup,
    Round,
    Speculation,
    speculative_generate,
    speculative_stream,
    speculative_verify,
)
from companion.generate.stream import (
    Completion,
    Piece,
    StopStrings,
    StreamDecoder,
    generate_stream,
    generate_text,
)

__all__ = [
    "Completion",
    "Copying",
    "Hypothesis",
    "ModelDrafter",
    "OneOf",
    "Piece",
    "PromptLookup",
    "Round",
    "Speculation",
    "StopStrings",
    "StreamDecoder",
    "beam_search",
    "generate",
    "generate_stream",
    "generate_text",
    "greedy_search",
    "length_penalty",
    "min_p",
    "repetition_penalty",
    "sample",
    "speculative_generate",
    "speculative_stream",
    "speculative_verify",
    "temperature",
    "top_k",
    "top_p",
    "typical",
]
