"""Chat templates that place images: LLaVA-1.5's, ChatML's, or a language model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any


IMAGE = "<image>"

# Contents made of parts become strings, an image a line of its own; then a template that knows strings alone follows.
FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}{%- set content = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set content.text = content.text + '<image>\n' -%}"
    "{%- else -%}{%- set content.text = content.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': content.text}] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)

_BOS = "{{- bos_token -}}"  # left out for tokenizers that do not begin with it
TEMPLATES = {
    # LLaVA-1.5's, from Vicuna.
    "vicuna": FLATTEN + _BOS + "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + ' ' -}}"
    "{%- set messages = messages[1:] -%}{%- else -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user\\'s questions. ' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}"
    "{%- else -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}",
    # What LLaVA's first stage trains on: images and captions. Questions are left out.
    "plain": FLATTEN + _BOS + "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- else -%}{{- '<image>\n' * message['content'].count('<image>') -}}{%- endif -%}"
    "{%- endfor -%}",
    "chatml": FLATTEN + "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
}
# Special tokens that a template needs, which a tokenizer may lack.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}


def chat_template(name: str, tokenizer: Any) -> str:
    """
    A template by name.

    Args:
        name (`str`): `"auto"` (the tokenizer's own, `"vicuna"` if it has none), one of `TEMPLATES`, or the path of a
            Jinja file.
        tokenizer (`PreTrainedTokenizerBase`): of the language model.

    Raises:
        `ValueError`: if there is no such template, or the tokenizer lacks its tokens.
    """
    if name == "auto":
        own = tokenizer.chat_template
        if isinstance(own, str):
            return own if "'image'" in own or '"image"' in own else FLATTEN + own
        name = "vicuna"
    if name in TEMPLATES:
        unknown = [token for token in TOKENS.get(name, ()) if token not in tokenizer.get_vocab()]
        if unknown:
            raise ValueError(
                f"chat_template={name!r} needs the special token {unknown[0]!r}, which the tokenizer lacks; "
                f"use 'vicuna'."
            )
        begins = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        return TEMPLATES[name] if begins else TEMPLATES[name].replace(_BOS, "")
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"chat_template={name!r} is no file; pass 'auto', {', '.join(map(repr, TEMPLATES))} or a Jinja file."
        )
    return path.read_text(encoding="utf-8")
