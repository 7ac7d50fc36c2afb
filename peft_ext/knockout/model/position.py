"""Beginning of the prompt in the sequence that a model sees, cache and virtual tokens included."""

from __future__ import annotations


class PromptPosition:
    """
    Follows the calls to a model, and refuses those whose length does not fit the masks.

    Args:
        length (`int`): tokens in the prompt, the masks' width.
        virtual_tokens (`int`): embeddings that prompt tuning puts before it.
        answer_tokens (`int`): tokens that may follow it in its own call, or come together later.
    """

    def __init__(self, length: int, virtual_tokens: int = 0, answer_tokens: int = 0) -> None:
        if isinstance(answer_tokens, bool) or not isinstance(answer_tokens, int) or answer_tokens < 0:
            raise ValueError(f"answer_tokens is {answer_tokens!r}: must be a whole number of at least 0.")
        self.length = length
        self.virtual_tokens = virtual_tokens
        self.answer_tokens = answer_tokens
        self._starts: dict[int, int] = {}
        self._tokens: dict[int, int] = {}
        self.called = False  # whether there was a call since

    def reset(self) -> None:
        """Forget earlier calls."""
        self._starts, self._tokens, self.called = {}, {}, False

    def start(self, queries: range, layer: int) -> int:
        """
        The position of the prompt's first token, in a call that holds these positions.

        Raises:
            `ValueError`: if this cannot be the prompt that the masks were made for.
        """
        self.called = True
        known = self._starts.get(layer)
        if known is not None and queries.start >= known + self.length:
            return known  # a step that continues the cache
        first = queries.start + self.virtual_tokens  # a prefix in the cache comes before the prompt
        tokens = len(queries) - self.virtual_tokens
        step = len(queries) <= 1 + self.answer_tokens
        if self.length <= tokens <= self.length + self.answer_tokens:
            self._starts[layer], self._tokens[layer] = first, tokens
        elif known == first and self.length < tokens <= self._tokens[layer] + 1:
            self._tokens[layer] = tokens  # without a cache, each step repeats the sequence and adds a token
        elif step and known is None and queries.start >= self.length:
            self._starts[layer] = self.virtual_tokens  # the cache was filled before
        elif not (step and known is not None and queries.start > known):  # assisted generation took tokens back
            if tokens < self.length:
                remedy = "pass the prompt in one call, without prefill_chunk_size and with no part of it in the cache"
            else:
                remedy = (
                    "for tokens after the prompt, such as an answer or the candidates of assisted generation, set "
                    "answer_tokens to the most that come at once"
                )
            raise ValueError(
                f"The masks are for a prompt of {self.length} tokens, but the model was called with {tokens}. Make "
                f"the groups from the inputs as the processor expands them; {remedy}."
            )
        return self._starts[layer]
