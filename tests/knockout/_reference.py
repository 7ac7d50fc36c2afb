"""A Llama decoder written out densely, with one bool mask per layer: what knockouts are measured against."""

import torch


def _norm(hidden, weight, epsilon):
    return weight * hidden / (hidden.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def _rotate(states, positions, theta):
    """Rotary embedding. `states`: `[batch, heads, tokens, head_dim]`."""
    half = states.shape[-1] // 2
    # in single precision, as transformers does whatever the model's dtype
    angle = positions[:, None, :, None] * theta ** -(torch.arange(half) / half)
    cosine, sine = angle.cos().to(states), angle.sin().to(states)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def llama_logits(model, embeddings, attended, blocked=None, zeroed=None):
    """
    Logits `[batch, tokens, vocabulary]` of a Llama with blocked edges.

    `embeddings`: `[batch, tokens, D]`; `attended`: bool `[batch, tokens]`; `blocked`: by layer bool
    `[batch, queries, keys]`; `zeroed`: by (layer, "attention" or "mlp") bool `[batch, tokens]`.
    """
    config = model.get_decoder().config
    decoder, blocked, zeroed = model.get_decoder(), blocked or {}, zeroed or {}
    batch, tokens, _ = embeddings.shape
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    # transformers' models count positions over padding too, unless they are told otherwise
    positions = torch.arange(tokens).expand(batch, -1)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    hidden = embeddings
    for index, layer in enumerate(decoder.layers):
        normed = _norm(hidden, layer.input_layernorm.weight, config.rms_norm_eps)
        attention = layer.self_attn
        split = [
            projection(normed).view(batch, tokens, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key = (_rotate(states, positions, theta) for states in split[:2])
        key, value = (states.repeat_interleave(groups, 1) for states in (key, split[2]))
        edges = causal & attended[:, None] if index not in blocked else causal & attended[:, None] & ~blocked[index]
        scores = query @ key.transpose(2, 3) / attention.head_dim**0.5
        # a softmax over the open edges, and zeros where there are none
        weights = scores.masked_fill(~edges[:, None], -torch.inf).softmax(-1).nan_to_num(0)
        assert weights.shape[1] == heads
        added = attention.o_proj((weights @ value).transpose(1, 2).reshape(batch, tokens, -1))
        if (index, "attention") in zeroed:
            added = added * ~zeroed[index, "attention"][..., None]
        # a row without edges adds nothing at all
        hidden = hidden + added * edges.any(-1)[..., None]
        normed = _norm(hidden, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        mlp = layer.mlp
        added = mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        if (index, "mlp") in zeroed:
            added = added * ~zeroed[index, "mlp"][..., None]
        hidden = hidden + added
    return model.lm_head(_norm(hidden, decoder.norm.weight, config.rms_norm_eps))


def decoder_embeddings(model, batch):
    """What enters the first layer, image features included: `[batch, tokens, D]`."""
    seen = []

    def see(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    with model.get_decoder().layers[0].register_forward_pre_hook(see, with_kwargs=True):
        model(**batch)
    return seen[0]
