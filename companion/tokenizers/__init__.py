"""From text to token ids and back."""

from companion.tokenizers.bpe import GPT2_PATTERN, BPETokenizer

__all__ = ["GPT2_PATTERN", "BPETokenizer"]
