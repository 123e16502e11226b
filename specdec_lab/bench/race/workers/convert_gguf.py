"""A Llama checkpoint folder (config.json, model.safetensors, tokenizer.json) as one float32 GGUF file for llama.cpp.

    python convert_gguf.py FOLDER OUT.gguf

Needs numpy and gguf. The tokenizer is written so that the file loads; prompts of the benchmark are token ids.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# What transformers calls a tensor, and what llama.cpp's llama architecture calls it.
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OF_A_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
NORMAL, CONTROL = 1, 3  # kinds of tokens in a GGUF vocabulary


class CannotConvert(ValueError):
    """A checkpoint that this script would convert wrongly."""


def gguf_name(name: str) -> str:
    """What llama.cpp calls this tensor."""
    layer = LAYER.fullmatch(name)
    if layer and layer[2] in OF_A_LAYER:
        return f"blk.{layer[1]}.{OF_A_LAYER[layer[2]]}.weight"
    if name not in WHOLE:
        raise CannotConvert(f"the checkpoint has a tensor {name}, which a Llama of llama.cpp does not have")
    return WHOLE[name]


def pair_rows(weight: Floats, num_heads: int) -> Floats:
    """Rows of a query or key projection in the order that llama.cpp rotates.

    transformers rotates row i of a head together with row i + half; llama.cpp rotates neighbours, so these two become
    rows 2 i and 2 i + 1. Scores do not change: queries and keys are reordered alike.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def converted(state: Mapping[str, Floats], config: Mapping[str, Any]) -> Iterator[tuple[str, Floats]]:
    """(name, values) of the GGUF file, in the order of the checkpoint."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, values in state.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue  # llama.cpp takes the embedding where a file has no output
        projection = name.split(".")[-2]
        yield gguf_name(name), pair_rows(values, heads[projection]) if projection in heads else values


def check(config: Mapping[str, Any]) -> None:
    """Refuse what would load and compute something else."""
    rope = config["rope_parameters"]["rope_type"]
    asked = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, wanted in asked.items():
        if config[key] != wanted:
            raise CannotConvert(f"{key} is {config[key]!r}; only {wanted!r} is converted")
    if rope != "default":
        raise CannotConvert(f"rope_type is {rope!r}; only plain rotation is converted")


def read_safetensors(path: Path) -> dict[str, Floats]:
    """All tensors of a file as float32; exact, also from bfloat16, which numpy has no type for."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: as_float32(data[start + about["data_offsets"][0] : start + about["data_offsets"][1]], about["dtype"]).reshape(
            about["shape"]
        )
        for name, about in header.items()
    }


def as_float32(data: bytes, dtype: str) -> Floats:
    """Flat values of stored bytes."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    if dtype not in ("F32", "F16"):
        raise CannotConvert(f"the checkpoint stores {dtype}; F32, F16 and BF16 can be read")
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype(np.float32)


def vocabulary(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int], list[str]]:
    """(tokens by id, their kinds, merges) of a byte-level BPE tokenizer.json."""
    model = tokenizer["model"]
    if model["type"] != "BPE" or tokenizer["pre_tokenizer"]["type"] != "ByteLevel":
        raise CannotConvert("tokenizer.json is no byte-level BPE, which is the only kind converted")
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {i: text for text, i in model["vocab"].items()} | special
    if sorted(by_id) != list(range(size)):
        raise CannotConvert(f"the tokenizer has {len(by_id)} tokens, the model {size}; they must be the same ids")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return [by_id[i] for i in range(size)], [CONTROL if i in special else NORMAL for i in range(size)], merges


def write(folder: Path, out: Path) -> None:
    """Read the checkpoint in `folder`, write `out`."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    check(config)
    tokens, kinds, merges = vocabulary(json.loads((folder / "tokenizer.json").read_text()), config["vocab_size"])
    writer = gguf.GGUFWriter(str(out), "llama")
    describe(writer, config, folder.name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the split that transformers' ByteLevel uses
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    for name, values in converted(read_safetensors(folder / "model.safetensors"), config):
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, config: Mapping[str, Any], name: str) -> None:
    """The sizes of the model."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_name(name)
    writer.add_file_type(0)  # all float32
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="config.json, model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="the file to write")
    chosen = parser.parse_args()
    try:
        write(chosen.folder, chosen.out)
    except KeyError as missing:
        raise SystemExit(f"not converted: the checkpoint's files have no {missing}") from missing
    except (CannotConvert, OSError) as error:
        raise SystemExit(f"not converted: {error}") from error
    print(f"{chosen.out}: {chosen.out.stat().st_size:,} bytes, float32")


if __name__ == "__main__":
    main()
