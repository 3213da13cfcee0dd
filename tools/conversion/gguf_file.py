"""A Llama-family model as one GGUF file, through the `gguf` package, one tensor in memory at a time.

Keys, the order of rotary halves in q and k, and fp32 norms are llama.cpp's (convert_hf_to_gguf.py, LlamaModel). Weights
stay floating; llama.cpp's own tool quantises further. The tokenizer is a byte-level BPE in `tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.state import State
from launcher.stored.tensors import Progress
from launcher.stored.values import Ledger, Values, whole
from tools.conversion.model import written_as
from tools.formats.expected import check_tied, choose, expected_tensors
from tools.formats.hf import read_config

FAMILIES = ("llama", "mistral")
"""`model_type` of what llama.cpp calls llama."""
NORMAL, CONTROL, UNUSED = 1, 3, 5
"""llama.cpp's kinds of tokens (LLAMA_TOKEN_TYPE_*)."""
LLAMA_3_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
"""Begins the expression by which Llama 3's tokenizer cuts words; llama.cpp calls it llama-bpe."""


class GgufPlan:
    """Everything decided before the first byte. Raises `CheckpointError`."""

    def __init__(self, state: State, config_dir: Path, dtype: torch.dtype | None) -> None:
        self.config = read_config(config_dir)
        if self.config["model_type"] not in FAMILIES:
            way_out = f"write hf:, and convert that with llama.cpp; written here: {', '.join(FAMILIES)}"
            raise CheckpointError("gguf", self.config["model_type"], "is not of the Llama family", way_out)
        _check_library()
        self.tokenizer = _read_tokenizer(config_dir)
        expected = expected_tensors(config_dir, self.config)
        chosen = choose(state.tensors, state.aliases, expected, state.where)
        check_tied(state.tensors, chosen, expected, state.where)
        self.values: Mapping[str, Values] = {name: state.tensors[read] for name, read in chosen.items()}
        matrices = written_as(self.values, dtype)
        self.dtypes = {name: e.dtype if len(e.shape) > 1 else torch.float32 for name, e in matrices.items()}
        self.num_bytes = sum(
            torch.Size(values.shape).numel() * self.dtypes[name].itemsize for name, values in self.values.items()
        )

    def write(self, file: Path, ledger: Ledger, report: Progress) -> None:
        import gguf

        writer = gguf.GGUFWriter(file, "llama")
        _add_sizes(writer, self.config)
        _add_tokens(writer, self.tokenizer, int(self.config["vocab_size"]))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.config["num_hidden_layers"])
        for name, values in self.values.items():
            size = torch.Size(values.shape).numel() * self.dtypes[name].itemsize
            told = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if told is None:
                raise CheckpointError("gguf", name, "is a tensor that llama.cpp has no name for", "write hf:")
            writer.add_tensor_info(told, values.shape, _stored_as(self.dtypes[name]), size, _kind(self.dtypes[name]))
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for name in self.values:
            array = self._array(name, ledger)
            writer.write_tensor_data(array)
            done += array.nbytes
            report("writing", done, self.num_bytes)
        writer.close()

    def _array(self, name: str, ledger: Ledger) -> Any:
        tensor = whole(self.values[name], ledger).to(self.dtypes[name])
        heads = int(self.config["num_attention_heads"])
        if name.endswith(("k_proj.weight", "k_proj.bias")):
            tensor = _interleaved(tensor, int(self.config.get("num_key_value_heads") or heads))
        elif name.endswith(("q_proj.weight", "q_proj.bias")):
            tensor = _interleaved(tensor, heads)
        return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers rotates the halves of a head against each other, llama.cpp neighbours."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(tensor.shape).contiguous()


def _stored_as(dtype: torch.dtype) -> Any:
    import numpy as np

    return np.dtype({torch.float32: "float32", torch.float16: "float16"}.get(dtype, "int16"))


def _kind(dtype: torch.dtype) -> Any:
    from gguf import GGMLQuantizationType as Kind

    kinds = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
    if dtype not in kinds:
        raise CheckpointError("gguf", str(dtype), "is no type of weights that is written", "use --dtype bf16")
    return kinds[dtype]


def _check_library() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CheckpointError("gguf", ABSENT, "needs the library gguf", "pip install 'fleetune[gguf]'") from None


def _add_sizes(writer: Any, config: Mapping[str, Any]) -> None:
    heads = int(config["num_attention_heads"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_vocab_size(config["vocab_size"])


def _rope_base(config: Mapping[str, Any]) -> float:
    """Plain rotary positions alone: the scaled kinds have further keys and tensors."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            "gguf", str(kind), "is a scaling of positions that is not written", "use llama.cpp's tool"
        )
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def _read_tokenizer(config_dir: Path) -> dict[str, Any]:
    file = config_dir / "tokenizer.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        is_bpe = found["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(found["pre_tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(str(file), ABSENT, "is missing or no tokenizer", "name another with --config") from None
    if not is_bpe:
        raise CheckpointError(str(file), ABSENT, "is no byte-level BPE", "convert an hf: folder with llama.cpp's tool")
    return found


def _add_tokens(writer: Any, tokenizer: Mapping[str, Any], size: int) -> None:
    model = tokenizer["model"]
    by_id = {number: token for token, number in model["vocab"].items()}
    special = {one["id"]: one["content"] for one in tokenizer.get("added_tokens", ())}
    by_id |= special
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [CONTROL if n in special else NORMAL if n in by_id else UNUSED for n in range(size)]
    words = json.dumps(tokenizer["pre_tokenizer"], ensure_ascii=False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if json.dumps(LLAMA_3_WORDS, ensure_ascii=False)[1:-1] in words else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
