"""Conversations to token ids and labels: the assistant's answers, with the token that ends each of them."""

from __future__ import annotations

from typing import Any

from .templates import IMAGE


IGNORED = -100

Messages = list[dict[str, Any]]


def render(processor: Any, messages: Messages, prompt: bool = False) -> str:
    """The chat template's text; with `prompt`, up to where the assistant's next answer begins."""
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def answer_spans(processor: Any, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """
    A conversation's text, and where in it the assistant's answers are, each with its end-of-turn token.

    An answer begins where the prompt ends that the template makes of what precedes it, so that training sees what
    generation does.

    Raises:
        `ValueError`: if the template rewrites earlier turns, so that no answer's place is known.
    """
    text = render(processor, messages)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(processor, messages[:number], prompt=True)
        upto = render(processor, messages[: number + 1]).rstrip()
        if not (text.startswith(prompt) and text.startswith(upto) and len(prompt) < len(upto)):
            raise ValueError(
                f"The chat template changes earlier turns when later ones follow (turn {number}), so the labels of a "
                "conversation can't be told. Compose with template='vicuna' or 'chatml', or a Jinja file of your own."
            )
        spans.append((len(prompt), len(upto)))
    return text, spans


def encode(
    processor: Any, messages: Messages, image_tokens: list[int], max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """
    Token ids of a conversation, and labels that are -100 outside answers; more than `max_length` tokens are cut at the
    end. `image_tokens`: the number of tokens of each image.

    Raises `ValueError` if the conversation has another number of images, or an image does not fit `max_length`.
    """
    text, spans = answer_spans(processor, messages)
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    image_id, images = processor.image_token_id, iter(image_tokens)
    ids: list[int] = []
    labels: list[int] = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == image_id:
            number = next(images, None)
            if number is None:
                raise ValueError(
                    f"A conversation has more {IMAGE!r} than its {len(image_tokens)} images: {text[:80]!r}"
                )
            ids += [token] * number
            labels += [IGNORED] * number
        else:
            answered = any(start < stop and end > begin for begin, stop in spans)
            ids.append(token)
            labels.append(token if answered else IGNORED)
    if next(images, None) is not None:
        raise ValueError(f"A conversation has fewer {IMAGE!r} than its {len(image_tokens)} images: {text[:80]!r}")
    if max_length is not None and len(ids) > max_length:
        if image_id in ids[max_length:]:
            raise ValueError(
                f"max_length={max_length} cuts an image of a conversation of {len(ids)} tokens; allow more: "
                f"{text[:80]!r}"
            )
        ids, labels = ids[:max_length], labels[:max_length]
    return ids, labels


def end_of_turn(processor: Any) -> int:
    """
    The token that ends an answer in the chat template.

    Raises:
        `ValueError`: if it is no special token, so that generation would not know where to stop.
    """
    messages: Messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    _, labels = encode(processor, messages, [])
    last = labels[-1] if labels[-1] != IGNORED else next(label for label in reversed(labels) if label != IGNORED)
    if last not in processor.tokenizer.all_special_ids and last not in processor.tokenizer.added_tokens_decoder:
        raise ValueError(
            f"The chat template ends an answer with {processor.tokenizer.decode([last])!r}, which is no special "
            "token, so generation would not stop there. Compose with template='vicuna', or a Jinja file that ends "
            "answers with eos_token."
        )
    return int(last)
