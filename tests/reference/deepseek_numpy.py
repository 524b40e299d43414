"""DeepSeek-MoE-16B's forward pass (model_type "deepseek") as plainly as possible: one token, one head at a time.

Attention, norms and the first layers as in Llama; then mixtures of experts: DeepSeekMoE (arXiv:2401.06066), eqs. 9–11.
"""

import numpy as np


def forward(tensors: dict[str, np.ndarray], config: dict, ids: list[int]) -> list[dict[str, np.ndarray]]:
    """For each layer the sites resid_pre, mlp_in, mlp_out, resid_post [tokens, d_model] of one text."""
    x, sites = tensors["model.embed_tokens.weight"][ids].astype(np.float64), []
    for n in range(config["num_hidden_layers"]):
        w = {
            name.removeprefix(f"model.layers.{n}."): tensor.astype(np.float64)
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{n}.")
        }
        middle = x + attention(w, config, norm(x, w["input_layernorm.weight"], config))
        mlp_in = norm(middle, w["post_attention_layernorm.weight"], config)
        dense = n < config["first_k_dense_replace"] or n % config["moe_layer_freq"] != 0
        mlp_out = np.stack([mlp(w, "mlp.", token) if dense else mixture(w, config, token) for token in mlp_in])
        sites.append({"resid_pre": x, "mlp_in": mlp_in, "mlp_out": mlp_out, "resid_post": middle + mlp_out})
        x = middle + mlp_out
    return sites


def norm(x, weight, config):
    return weight * x / np.sqrt((x**2).mean(1, keepdims=True) + config["rms_norm_eps"])


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def turned(x, position, theta):
    """Rotary position embedding: the pairs (i, i + half) turn by position·theta^(−2i/size)."""
    half, out = len(x) // 2, np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def attention(w, config, x):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, out = x.shape[1] // heads, np.zeros_like(x)
    q, k, v = ((x @ w[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, size) for name in "qkv")
    for head in range(heads):
        group = head * kv_heads // heads
        for t in range(len(x)):
            query = turned(q[t, head], t, config["rope_theta"])
            keys = [turned(k[s, group], s, config["rope_theta"]) for s in range(t + 1)]
            weights = softmax(np.array([query @ key for key in keys]) / np.sqrt(size))
            out[t, head * size : (head + 1) * size] = sum(a * v[s, group] for s, a in enumerate(weights))
    return out @ w["self_attn.o_proj.weight"].T


def mlp(w, prefix, x):
    gate, up, down = (w[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


def mixture(w, config, x):
    scores = softmax(w["mlp.gate.weight"] @ x)
    chosen = np.argsort(-scores)[: config["num_experts_per_tok"]]
    return mlp(w, "mlp.shared_experts.", x) + sum(scores[e] * mlp(w, f"mlp.experts.{e}.", x) for e in chosen)
