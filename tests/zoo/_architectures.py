"""The architectures that adapters are tried on."""

from ._factory import TOKENS, Architecture


_WAVES = {
    "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_buckets": 8,
}  # fmt: skip
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_WINDOWS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "num_attention_heads": ..., "window_size": 2}
_PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "patch_sizes": [4, 2], "strides": [4, 2],
    "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip
_VIT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "vocab_size": 48,
}  # fmt: skip
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}

decoder, encoder, translator, vision, speech = "decoder", "encoder", "encoder-decoder", "vision", "speech"
ARCHITECTURES = {
    # decoders
    "llama": Architecture(decoder),
    "mistral": Architecture(decoder),
    "ministral": Architecture(decoder),
    "qwen2": Architecture(decoder),
    "qwen3": Architecture(decoder),
    "gemma": Architecture(decoder),
    "gemma2": Architecture(decoder),
    "gemma3_text": Architecture(decoder),
    "phi": Architecture(decoder),
    "phi3": Architecture(decoder),
    "gpt2": Architecture(decoder),
    "gpt_neo": Architecture(decoder, {"attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": Architecture(decoder),
    "gptj": Architecture(decoder, {"rotary_dim": 4}),
    "gpt_bigcode": Architecture(decoder),
    "codegen": Architecture(decoder, {"rotary_dim": 4, "n_head": 4, "num_attention_heads": 4}),
    "opt": Architecture(decoder),
    "bloom": Architecture(decoder),
    "falcon": Architecture(decoder),
    "mpt": Architecture(decoder),
    "olmo": Architecture(decoder),
    "olmo2": Architecture(decoder),
    "stablelm": Architecture(decoder),
    "starcoder2": Architecture(decoder),
    "cohere": Architecture(decoder),
    "granite": Architecture(decoder),
    "glm": Architecture(decoder),
    "persimmon": Architecture(decoder),
    "nemotron": Architecture(decoder),
    "smollm3": Architecture(decoder),
    "biogpt": Architecture(decoder),
    "xglm": Architecture(decoder, {"attention_heads": 2}),
    "ctrl": Architecture(decoder, {"dff": 24}),
    "openai-gpt": Architecture(decoder),
    # experts
    "mixtral": Architecture(decoder),
    "qwen2_moe": Architecture(decoder, {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": Architecture(decoder),
    "olmoe": Architecture(decoder),
    "phimoe": Architecture(decoder),
    "granitemoe": Architecture(decoder),
    "deepseek_v3": Architecture(decoder),
    "gpt_oss": Architecture(decoder),
    "llama4_text": Architecture(decoder, {"intermediate_size_mlp": 16, "interleave_moe_layer_step": 1}),
    "jetmoe": Architecture(decoder, {"kv_channels": 8}),
    # state-space models, linear attention and other recurrences
    "mamba": Architecture(decoder, {"time_step_rank": 4}),
    "mamba2": Architecture(decoder, {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "falcon_mamba": Architecture(decoder, {"time_step_rank": 4}),
    "jamba": Architecture(decoder, {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    "bamba": Architecture(decoder, {**_MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": Architecture(decoder, {**_MAMBA2, "mamba_d_ssm": 32}),
    "granitemoehybrid": Architecture(
        decoder, {**_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16}
    ),
    "zamba": Architecture(
        decoder, {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
    ),
    "zamba2": Architecture(
        decoder,
        {"n_mamba_heads": 4, "chunk_size": 4, "adapter_rank": 4, "layers_block_type": ["linear_attention", "hybrid"]},
    ),
    "nemotron_h": Architecture(
        decoder, {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "moe_shared_expert_intermediate_size": 24}
    ),
    "lfm2": Architecture(decoder, {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": Architecture(decoder, {**_LINEAR, "shared_expert_intermediate_size": 16}),
    "qwen3_5_text": Architecture(decoder, _LINEAR),
    "recurrent_gemma": Architecture(decoder, {"lru_width": 16, "block_types": ["recurrent", "attention"]}),
    # encoders
    "bert": Architecture(encoder),
    "roberta": Architecture(encoder),
    "xlm-roberta": Architecture(encoder),
    "camembert": Architecture(encoder),
    "electra": Architecture(encoder),
    "albert": Architecture(encoder),
    "distilbert": Architecture(encoder, {"hidden_dim": 24, "seq_classif_dropout": 0.0}),
    "deberta": Architecture(encoder, {"pooler_hidden_size": 16, "relative_attention": True, "pos_att_type": ["c2p"]}),
    "deberta-v2": Architecture(encoder, {"pooler_hidden_size": 16}),
    "modernbert": Architecture(encoder),
    "mpnet": Architecture(encoder),
    "mobilebert": Architecture(encoder, {"intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "squeezebert": Architecture(encoder, linear=False),
    "convbert": Architecture(encoder),
    "funnel": Architecture(encoder, {"block_sizes": [1, 1], "d_head": 8, "d_inner": 24}),
    "longformer": Architecture(
        encoder,
        {"attention_window": 4},
        idle=r"layer\.1\.attention\.self\.(query|key|value)",
        why="the classifier reads the first token, whose attention in the last layer is global",
    ),
    "big_bird": Architecture(encoder, {"attention_type": "original_full"}),
    "esm": Architecture(
        encoder, {"mask_token_id": 3}, idle="contact_head", why="it has a part in contact prediction alone"
    ),
    "ernie": Architecture(encoder),
    "layoutlm": Architecture(encoder),
    "fnet": Architecture(encoder),
    "nystromformer": Architecture(encoder, {"num_landmarks": 2, "segment_means_seq_len": 8, "conv_kernel_size": 3}),
    "roformer": Architecture(encoder),
    "rembert": Architecture(encoder, {"input_embedding_size": 16}),
    "canine": Architecture(
        encoder,
        {"num_hash_buckets": 64, "local_transformer_stride": 4, "downsampling_rate": 2},
        idle=r"final_char_encoder|projection\.conv",
        why="the classifier reads what comes before",
    ),
    "xlnet": Architecture(encoder, {"d_inner": 24}),
    "xlm": Architecture(encoder, {"emb_dim": 16}),
    # encoders with decoders
    "t5": Architecture(translator),
    "mt5": Architecture(translator),
    "umt5": Architecture(translator),
    "bart": Architecture(translator),
    "mbart": Architecture(translator),
    "marian": Architecture(translator),
    "pegasus": Architecture(translator),
    "blenderbot": Architecture(translator),
    "m2m_100": Architecture(translator),
    "led": Architecture(translator, {"attention_window": 4}, idle="_global", why="no token here has global attention"),
    "longt5": Architecture(translator),
    "switch_transformers": Architecture(translator, {"num_sparse_encoder_layers": 1}),
    "prophetnet": Architecture(translator, {"num_encoder_layers": 2, "num_encoder_attention_heads": 2}),
    # images
    "vit": Architecture(vision),
    "deit": Architecture(vision, {}, "DeiTForImageClassification"),
    "beit": Architecture(vision),
    "dinov2": Architecture(vision),
    "dinov3_vit": Architecture(vision, {}, "AutoModel"),
    "swin": Architecture(vision, _WINDOWS),
    "swinv2": Architecture(vision, _WINDOWS),
    "convnext": Architecture(vision, _STAGES),
    "convnextv2": Architecture(vision, _STAGES),
    "resnet": Architecture(vision, {**_STAGES, "embedding_size": 8}, linear=False),
    "regnet": Architecture(
        vision, {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 8, "groups_width": 8}, linear=False
    ),
    "mobilenet_v2": Architecture(vision, {"depth_multiplier": 0.25}, linear=False),
    "mobilevit": Architecture(
        vision,
        {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "image_size": 128, "patch_size": 2},
        inputs={"pixel_values": (3, 128, 128)},
    ),
    "segformer": Architecture(vision, {**_PYRAMID, "sr_ratios": [2, 1]}),
    "pvt": Architecture(vision, {**_PYRAMID, "sequence_reduction_ratios": [2, 1]}),
    "poolformer": Architecture(
        vision, {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "padding": [2, 1, 1, 1]}, linear=False
    ),
    "focalnet": Architecture(
        vision,
        {"embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    ),
    "levit": Architecture(
        vision,
        {
            "hidden_sizes": [8, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
            "image_size": 64,
            "patch_size": 16,
            "drop_path_rate": 0,
        },
        "LevitForImageClassification",
        {"pixel_values": (3, 64, 64)},
    ),
    "cvt": Architecture(
        vision,
        {
            "embed_dim": [8, 8, 16],
            "num_heads": [1, 2, 2],
            "depth": [1, 2, 3],
            "drop_path_rate": [0.0, 0.0, 0.0],
            "image_size": ...,
        },
        inputs={"pixel_values": (3, 64, 64)},
        idle=r"stages\.2\.layers\.2\..*projection_query\.convolution",
        why="the classifier reads the class token, whose query is not convolved",
    ),
    "siglip": Architecture(
        vision,
        {"vision_config": _VIT, "text_config": _VIT},
        idle=r"vision_model\.head",
        why="the classifier reads the mean over patches",
    ),
    "clip": Architecture(vision, {"vision_config": _VIT, "text_config": _VIT}),
    "efficientnet": Architecture(
        vision,
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64},
        None,
        {"pixel_values": (3, 64, 64)},
        linear=False,
    ),
    # speech
    "wav2vec2": Architecture(speech, _WAVES),
    "hubert": Architecture(speech, _WAVES),
    "wavlm": Architecture(speech, _WAVES),
    "unispeech-sat": Architecture(speech, _WAVES),
    "data2vec-audio": Architecture(speech, _WAVES),
    "sew": Architecture(speech, {**_WAVES, "squeeze_factor": 2}),
    "wav2vec2-conformer": Architecture(speech, _WAVES),
    "wav2vec2-bert": Architecture(
        speech, {**_WAVES, "feature_projection_input_dim": 16}, None, {"input_features": (TOKENS, 16)}
    ),
    "whisper": Architecture(speech, {"max_source_positions": 16}, None, {"input_features": (16, 32)}),
    "audio-spectrogram-transformer": Architecture(speech, {"max_length": 16}, None, {"input_values": (16, 16)}),
}

# What the ordinary test run tries.
SAMPLE = ("llama", "mixtral", "mamba", "jamba", "deberta", "t5", "convnext", "wavlm")
