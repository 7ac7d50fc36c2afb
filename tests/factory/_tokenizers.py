"""A tokenizer of bytes, with or without merges, and chat templates in the form of well-known models' own."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from peft_ext.factory.templates import IMAGE, chat_template


SPECIAL = ["<pad>", "<s>", "</s>", IMAGE, "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<turn>"]
TEXTS = ["USER: what color is it? ASSISTANT: red", "user assistant model what is this? blue and green", "Hello Hi"] * 3

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<turn>' + role + '\n' + m['content'] | trim + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Drops what the assistant thought in earlier turns, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'thought ' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = {"llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "forgetful": FORGETFUL}


def tokenizer(merges: int) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + len(SPECIAL) + merges
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )


def processor(template: str, merges: int = 0) -> LlavaProcessor:
    """With 2 × 2 patches an image."""
    words = tokenizer(merges)
    if template in OWN:
        words.chat_template = OWN[template]
        template = "auto"
    size = {"height": 16, "width": 16}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=chat_template(template, words),
    )
