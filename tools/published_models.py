"""`ModelCost` of models known by their sizes alone, as published tables give them, with what their stack keeps.

h width, r feed-forward ratio, f feed-forward width, V vocabulary, L blocks, a attention heads; bytes are of bf16.
"""

from __future__ import annotations

from launcher.cost.values import Flops, LinearInBatch, ModelCost, SavedBytes
from tools.published_table import Row

BF16, FP32 = 2, 4
FUSED_LOSS_BYTES = 4
"""Per logit: flash-attn's cross-entropy, llm-foundry's default, writes the gradient over the logits; bf16 twice."""
EAGER_LOSS_BYTES = 12
"""Per logit: fp32 log-softmax, its gradient and that of the logits; torchtitan deletes the bf16 logits before backward."""
COMPILED_LOSS_BYTES = 8
"""Per logit: torch.compile forms the log-softmax again from the bf16 logits, beside the fp32 and the bf16 gradient."""


def mpt_cost(row: Row) -> ModelCost:
    """A decoder block of MPT: LayerNorm, one product for queries, keys and values, flash attention, GELU.

    Parameters of a block: (4 + 2 r) h^2 of products; the rest of the published count is outside. FLOPs forward and per
    token: twice the weights of the products, 2 h V for the head, 4 L h per token of context. Kept per token and block:
    both norms' inputs and outputs 4 h, queries, keys and values 3 h, attention's output h, feed-forward before and after
    GELU 2 r h numbers, and in fp32 the logarithm of the sum of each head's row and each norm's mean and deviation.
    """
    width, ratio = row.count("hidden_size"), row.positive("ffn_ratio")
    products = (4 + 2 * ratio) * width**2
    kept = BF16 * (8 + 2 * ratio) * width + FP32 * (row.count("num_heads") + 4)
    return _cost(
        "MPTForCausalLM", row, row.count("num_params"), round(products), kept, BF16 * width, FUSED_LOSS_BYTES, products
    )


def llama_cost(row: Row) -> tuple[ModelCost, str]:
    """A decoder block of Llama with grouped queries and a gated feed-forward, and whether blocks are recomputed.

    Parameters of a block: 2 h^2 + 2 h kv + 3 h f + 2 h, kv the width of keys; embedding and head V h each. torchtitan's
    selective recompute keeps, of the products in their order q k v o w1 w3 w2, every second from the first (q, v, w1,
    w2) and attention's output with its sums; while a block runs backward, all of it is there.
    """
    width, blocks, inner = row.count("hidden_size"), row.count("num_layers"), row.count("ffn_size")
    heads = row.count("num_heads")
    keys = width // heads * row.count("num_kv_heads")
    products = 2 * width**2 + 2 * width * keys + 3 * width * inner
    tables = 1 if row.flag("tied_embeddings") else 2
    num_params = blocks * (products + 2 * width) + tables * row.count("vocab_size") * width + width
    whole = BF16 * (6 * width + 2 * keys + 4 * inner) + FP32 * (heads + 2)
    selective = BF16 * (4 * width + keys + inner) + FP32 * heads
    inputs = {"none": BF16 * width, "full": BF16 * width, SELECTIVE: selective}
    asked = row.choice("recompute", tuple(inputs))
    loss = COMPILED_LOSS_BYTES if row.flag("compile") else EAGER_LOSS_BYTES
    cost = _cost("LlamaForCausalLM", row, num_params, products + 2 * width, whole, inputs[asked], loss, products)
    return cost, "none" if asked == "none" else "full"


SELECTIVE = "selective per op (saves every second matmul and SDPA outputs)"


def _cost(
    architecture: str,
    row: Row,
    num_params: int,
    block_num_params: int,
    kept: float,
    block_input: float,
    loss_bytes_per_logit: int,
    products: float,
) -> ModelCost:
    """Every block alike; the last norm's input and output outside."""
    width, blocks, vocabulary = row.count("hidden_size"), row.count("num_layers"), row.count("vocab_size")
    outside = num_params - blocks * block_num_params
    if outside < 0:
        raise row.problem("num_params", f"is less than {blocks} blocks of {block_num_params} have", "mend the row")
    saved = SavedBytes(
        LinearInBatch(blocks * kept, 0), LinearInBatch(2 * BF16 * width, 0), LinearInBatch(blocks * block_input, 0)
    )
    return ModelCost(
        architecture=architecture,
        num_params=num_params,
        num_trainable_params=num_params,
        num_blocks=blocks,
        block_num_params=block_num_params,
        outside_num_params=outside,
        logits_width=vocabulary,
        logits_per_token=True,
        max_positions=None,
        saved={"bf16": saved},
        flops=Flops(2 * blocks * products, 2 * width * vocabulary, 4 * blocks * width),
        loss_bytes_per_logit=loss_bytes_per_logit,
    )
