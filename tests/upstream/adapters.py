"""Stand-ins for the LoRA adapters on the Hub that PEFT's tests load: adapters of the method, on the tiny models."""

import os
import warnings
from pathlib import Path

import transformers
from peft import get_peft_model

from .methods import Method


_OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
_T5 = "peft-internal-testing/tiny-random-T5ForConditionalGeneration"
_GPT2 = "peft-internal-testing/tiny-random-GPT2LMHeadModel"
_WHISPER = "peft-internal-testing/tiny-random-Whisper"

# Hub id of the adapter -> (class of its base model, Hub id of the base model, task)
ADAPTERS = {
    "gpt2-lora-random": ("AutoModelForCausalLM", _GPT2, "CAUSAL_LM"),
    "tiny-OPTForCausalLM-lora": ("AutoModelForCausalLM", _OPT, "CAUSAL_LM"),
    "tiny-opt-lora-revision": ("AutoModelForCausalLM", _OPT, "CAUSAL_LM"),
    "tiny-random-OPTForCausalLM-extended-vocab": ("AutoModelForCausalLM", _OPT, "CAUSAL_LM"),
    "tiny_GPT2ForTokenClassification-lora": ("AutoModelForTokenClassification", _GPT2, "TOKEN_CLS"),
    "tiny_OPTForFeatureExtraction-lora": ("AutoModel", _OPT, "FEATURE_EXTRACTION"),
    "tiny_OPTForQuestionAnswering-lora": ("AutoModelForQuestionAnswering", _OPT, "QUESTION_ANS"),
    "tiny_OPTForSequenceClassification-lora": ("AutoModelForSequenceClassification", _OPT, "SEQ_CLS"),
    "tiny_T5ForSeq2SeqLM-lora": ("AutoModelForSeq2SeqLM", _T5, "SEQ_2_SEQ_LM"),
    "tiny_WhisperForConditionalGeneration-lora": ("WhisperForConditionalGeneration", _WHISPER, None),
}
_EXTRA_TOKENS = [f"<extra {number}>" for number in range(64)]


def write_adapters(models: Path, method: Method) -> None:
    """Saves an adapter for every id of `ADAPTERS` beside the models; it is fast, and done anew for each run."""
    before = Path.cwd()
    os.chdir(models)  # so that the ids resolve, and are what the adapters remember of their base
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, (model_class, base_id, task) in ADAPTERS.items():
                _write(f"peft-internal-testing/{name}", model_class, base_id, task, method)
    finally:
        os.chdir(before)


def _write(folder: str, model_class: str, base_id: str, task: str | None, method: Method) -> None:
    base = getattr(transformers, model_class).from_pretrained(base_id)
    if folder.endswith("extended-vocab"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base_id)
        tokenizer.add_tokens(_EXTRA_TOKENS)
        base.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    targets = ["c_attn"] if base_id == _GPT2 else ["q", "v"] if base_id == _T5 else ["q_proj", "v_proj"]
    config = method.config_class(task_type=task, target_modules=targets, **method.kwargs)
    get_peft_model(base, config).save_pretrained(folder)
