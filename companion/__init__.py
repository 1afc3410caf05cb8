"""The tested mechanisms of the book *From Attention to Agents*, from attention to agents.

Importing the package has no side effect, reads no file and takes no network: every module is imported by
name (`from companion.attention import MultiHeadAttention`) and imports only from the floors below it.
"""

__version__ = "0.1.0"
