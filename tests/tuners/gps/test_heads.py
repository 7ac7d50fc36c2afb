"""GPS trains whole what a task puts on top of a pretrained model, under names that PEFT takes for nothing else."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel

from peft_ext import GPSConfig
from tests.contract._common import fill


BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**BERT, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**BERT, "image_size": 8, "patch_size": 4}
VBERT = {
    "text_config": {**TEXT, "model_type": "modernbert", "cls_token_id": 1, "sep_token_id": 2},
    "vision_config": {**IMAGE, "model_type": "siglip_vision_model"},
    "image_token_id": 31,
}
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "num_mel_bins": 8, "vocab_size": 32, "pad_token_id": 0,
    "decoder_start_token_id": 1, "classifier_proj_size": 8,
}  # fmt: skip
WAV2VEC2 = {
    **TEXT, "conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "tdnn_dim": [8, 8], "tdnn_kernel": [1, 1],
    "tdnn_dilation": [1, 1], "xvector_output_dim": 8,
}  # fmt: skip
CLASSIFIERS = {
    "ModernVBertForSequenceClassification": ("modernvbert", VBERT),
    "ModernVBertForTokenClassification": ("modernvbert", VBERT),
    "NomicBertForSequenceClassification": ("nomic_bert", TEXT),
    "WhisperForAudioClassification": ("whisper", WHISPER),
    "VideoMAEForVideoClassification": ("videomae", IMAGE),
    "BertForSequenceClassification": ("bert", TEXT),
    "ViTForImageClassification": ("vit", IMAGE),
}
MAGNITUDE = {"selection": "magnitude", "train_bias": False}  # needs no data


def _classifier(name):
    kind, options = CLASSIFIERS[name]
    return getattr(transformers, name)(AutoConfig.for_model(kind, **options, num_labels=3))


@pytest.mark.parametrize("target_modules", [None, "all-neurons"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_the_bare_model_lacks_is_trained_whole(name, target_modules):
    base = _classifier(name)
    prefix = f"{base.base_model_prefix}."
    bare = {key for key, _ in AutoModel.from_config(base.config).named_parameters()}
    new = {key for key, _ in base.named_parameters() if key not in bare and key.removeprefix(prefix) not in bare}
    assert new

    model = get_peft_model(base, GPSConfig(target_modules=target_modules, **MAGNITUDE))
    whole = {key for key, p in model.named_parameters() if p.requires_grad and "gps_delta" not in key}
    assert {key.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for key in whole} == new
    assert not any("modules_to_save" in key for key, _ in model.named_parameters() if "gps_delta" in key)


def test_a_head_called_like_a_part_of_the_body_is_saved_and_loaded(tmp_path):
    name = "ModernVBertForSequenceClassification"
    ids = torch.randint(3, 30, (2, 6))
    base = _classifier(name).eval()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = fill(get_peft_model(base, GPSConfig(**MAGNITUDE))).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)

    other = _classifier(name).eval()
    other.load_state_dict(state)
    before = other(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected)
    loaded.add_adapter("second", GPSConfig(**MAGNITUDE))
    assert loaded.peft_config["second"].modules_to_save == model.peft_config["default"].modules_to_save


def test_of_a_list_of_layers_each_is_trained_whole():
    """PEFT takes no list in modules_to_save."""
    base = transformers.Wav2Vec2ForXVector(AutoConfig.for_model("wav2vec2", **WAV2VEC2))
    with pytest.warns(UserWarning, match="'feature_extractor' belongs to the head but stays frozen"):
        model = get_peft_model(base, GPSConfig(**MAGNITUDE)).get_base_model()
    assert len(model.tdnn) == 2
    assert all(p.requires_grad for layer in model.tdnn for p in layer.modules_to_save.parameters())
