#!/usr/bin/env python3
"""Scores the same comments with llama.cpp on the CPU, one round for each line of input.

    llama.py CHECKPOINT WORK.json [--threads N]

Needs the packages `llama-cpp-python`, `gguf` and `safetensors`. CHECKPOINT is a Hugging Face folder of Gemma 3, which is
converted to GGUF in f32, and quantised by llama.cpp to Q8_0. WORK.json is that of `pytorch.py`. The prefix is decoded
once, and its keys and values are shared by the sequences of all comments; comments are packed into batches without
padding, and only the last token of each has logits. (llama.cpp computes those of the whole vocabulary.) The batch size
is the fastest of several.

Each line of input names one of the `variants`. The answer is one line of JSON: `wall` and `cpu` in seconds, `batch` in
tokens, and `logits` of the two labels for each comment.
"""

import argparse
import ctypes
import json
import pathlib
import sys
import tempfile
import time

import gguf
import llama_cpp
import numpy
from safetensors import safe_open

BATCHES = (128, 256, 512, 1024)
# Names of a layer's tensors in a checkpoint and in GGUF.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def convert(checkpoint, path):
    """Writes the checkpoint as GGUF in f32, without a tokenizer."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{layer}.{name}": f"blk.{layer}.{short}" for name, short in LAYER.items()}
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name).float().numpy()
            if name.endswith("norm.weight"):
                # Gemma's norms multiply by one more than what the checkpoint holds.
                tensor = tensor + numpy.float32(1.0)
            writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Variant:
    """One model with the prefix's keys and values in sequence 0."""

    def __init__(self, path, work, threads):
        self.work = work
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.threads = threads
        self.context = None
        times = {}
        for batch in BATCHES:
            self.prepare(batch)
            self.score()
            times[batch] = timed(self.score)["wall"]
        self.prepare(min(times, key=times.get))

    def prepare(self, batch):
        """Creates a context for batches of this many tokens and decodes the prefix."""
        if self.context:
            llama_cpp.llama_free(self.context)
        self.batch_tokens = batch
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = 4096
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_seq_max = 64
        parameters.kv_unified = True
        parameters.swa_full = True
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = -1
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)
        prefix = self.work["prefix"]
        self.decode([(token, position, 0, False) for position, token in enumerate(prefix)])

    def decode(self, tokens):
        """Decodes tokens: (id, position, sequence, whether it has logits)."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        for index, (token, position, sequence, logits) in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = logits
        batch.n_tokens = len(tokens)
        result = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if result != 0:
            raise RuntimeError(f"llama_decode returned {result}")

    def score(self):
        """Returns the logits of the labels for each comment."""
        comments, prefix = self.work["comments"], len(self.work["prefix"])
        answers, start = [], 0
        while start < len(comments):
            end, size = start, 0
            while end < len(comments) and end - start < 63 and size + len(comments[end]) <= self.batch_tokens:
                size += len(comments[end])
                end += 1
            end = max(end, start + 1)
            tokens, outputs = [], []
            for sequence, comment in enumerate(comments[start:end], 1):
                llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, 0, prefix)
                for index, token in enumerate(comment):
                    tokens.append((token, prefix + index, sequence, index + 1 == len(comment)))
                outputs.append(len(tokens) - 1)
            for piece in range(0, len(tokens), self.batch_tokens):
                self.decode(tokens[piece : piece + self.batch_tokens])
                for output in outputs:
                    if piece <= output < piece + self.batch_tokens:
                        logits = llama_cpp.llama_get_logits_ith(self.context, output - piece)
                        answers.append([logits[label] for label in self.work["labels"]])
            for sequence in range(1, end - start + 1):
                llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
            start = end
        return answers


def timed(work):
    """Returns the wall-clock time and the CPU time of all threads, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "result": result}


@llama_cpp.llama_log_callback
def log_errors(level, text, _data):
    """Prints what llama.cpp logs as an error."""
    if level == llama_cpp.GGML_LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("work")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with open(arguments.work, encoding="utf-8") as file:
        work = json.load(file)
    llama_cpp.llama_log_set(log_errors, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        f32, q8_0 = pathlib.Path(folder, "f32.gguf"), pathlib.Path(folder, "q8_0.gguf")
        convert(arguments.checkpoint, f32)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        if llama_cpp.llama_model_quantize(str(f32).encode(), str(q8_0).encode(), parameters) != 0:
            raise RuntimeError("llama.cpp cannot quantise the checkpoint")
        variants = {
            "f32": Variant(f32, work, arguments.threads),
            "int8 (Q8_0)": Variant(q8_0, work, arguments.threads),
        }
    ready = {"version": llama_cpp.__version__, "variants": list(variants)}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        variant = variants[line.strip()]
        answer = timed(variant.score)
        answer["logits"] = answer.pop("result")
        answer["batch"] = f"{variant.batch_tokens} tokens"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
