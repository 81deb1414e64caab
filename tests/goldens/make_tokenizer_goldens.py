"""Makes files of tests/text/data from its picked_texts.json: hard texts, toy vocabularies, llama.cpp's token ids.

llama.cpp comes as the wheel `xllamacpp`; each vocabulary is written into a GGUF file (around a model of a few hundred
weights, since llama.cpp loads no server without one), loaded, and asked over its HTTP endpoint /tokenize. Run in an
environment of its own:

    pip install xllamacpp gguf tokenizers
    python tests/goldens/make_tokenizer_goldens.py SMOLLM2.gguf
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import unicodedata
import urllib.request
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DATA = Path(__file__).parent.parent / "text" / "data"
BYTE_LEVEL_PRES = ("default", "gpt-2", "smollm", "llama-bpe", "qwen2")
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool>", "  \t"]

PICKED = json.loads((DATA / "picked_texts.json").read_text(encoding="utf-8"))


def hard_texts() -> list[str]:
    rng = random.Random(20)
    return PICKED["texts"] + ["".join(rng.choices(PICKED["pieces"], k=rng.randint(2, 24))) for _ in range(260)]


def training_texts() -> list[str]:
    rng = random.Random(7)
    words = [
        *PICKED["texts"],
        "the thing in the ring",
        "12 123 1234 2024",
        "it's IT'S",
        "\n\n\n",
        "    ",
        "!!! ??? ...",
        "été",
        "$12",
        "a1",
    ]
    return ["".join(rng.choices(words, k=4)) for _ in range(600)]


def toy_byte_level() -> dict[str, list[object]]:
    """Merges learnt without any splitting into words, so that every rule of splitting changes the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1100, initial_alphabet=alphabet, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(training_texts(), trainer)
    state = json.loads(tokenizer.to_str())["model"]
    # llama.cpp makes a token with the text </s> a control token whatever its type.
    marked = {*CONTROL, *USER_DEFINED, "</s>"}
    learnt = [token for token in sorted(state["vocab"], key=state["vocab"].__getitem__) if token not in marked]
    tokens = [*CONTROL, *learnt, *USER_DEFINED]
    types = [3] * len(CONTROL) + [1] * len(learnt) + [4] * len(USER_DEFINED)
    return {
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in state["merges"] if marked.isdisjoint([*merge, "".join(merge)])],
    }


def toy_sentence_piece() -> dict[str, list[object]]:
    """Pieces learnt with spaces as U+2581, scored by the order in which they were learnt, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Metaspace()
    texts = [text.replace(" ", "▁") for text in training_texts()]
    trainer = trainers.BpeTrainer(vocab_size=700, limit_alphabet=150, show_progress=False, max_token_length=10)
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    numbers = [f"<0x{value:02X}>" for value in range(256)]
    taken = {*special, *numbers, "<tool>"}
    merged = [token for token in dict.fromkeys("".join(merge) for merge in state["merges"]) if token not in taken]
    letters = [token for token in state["vocab"] if len(token) == 1 and token != "\0"]
    tokens = [*special, *numbers, *merged, *letters, "<tool>"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(letters)) + [4]
    scores = [0.0] * (3 + 256) + [-float(i) for i in range(len(merged) + len(letters))] + [0.0]
    return {"tokens": tokens, "token_type": types, "scores": scores}


def write_gguf(path: Path, metadata: dict[str, object]) -> None:
    """A llama model of one layer with a given tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    width, heads, ffn, num_tokens = 32, 1, 32, len(metadata["tokens"])
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(num_tokens)
    for name, value in metadata.items():
        key = f"tokenizer.ggml.{name}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case str():
                writer.add_string(key, value)
            case int():
                writer.add_uint32(key, value)
            case list():
                writer.add_array(key, value)
    shapes = {
        "token_embd": (num_tokens, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
    }
    shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (ffn, width), "blk.0.ffn_up": (ffn, width), "blk.0.ffn_down": (width, ffn)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_ids(path: Path, texts: list[str]) -> list[list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.warmup, params.n_parallel, params.cpuparams.n_threads = 256, False, 1, 1
    server = xllamacpp.Server(params)
    answers = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            answers.append(json.load(answer)["tokens"])
    return answers


def main() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    texts = hard_texts()
    byte_level, sentence_piece = toy_byte_level(), toy_sentence_piece()
    roles = {"bos_token_id": 1, "eos_token_id": 2}
    cases: dict[str, tuple[str, dict[str, object]]] = {
        f"pre-{pre}": ("byte_level", {"model": "gpt2", "pre": pre, **roles}) for pre in BYTE_LEVEL_PRES
    }
    cases["pre-qwen2-bos-eos"] = ("byte_level", {**cases["pre-qwen2"][1], "add_bos_token": True, "add_eos_token": True})
    cases["pre-llama-bpe-plain"] = ("byte_level", {**cases["pre-llama-bpe"][1], "add_bos_token": False})
    spm = {"model": "llama", "unknown_token_id": 0, **roles}
    cases["sentence-piece"] = ("sentence_piece", spm)
    cases["sentence-piece-no-prefix"] = ("sentence_piece", {**spm, "add_space_prefix": False, "add_bos_token": False})
    vocabularies = {"byte_level": byte_level, "sentence_piece": sentence_piece}
    goldens: dict[str, object] = {}
    for name, (vocabulary, metadata) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "toy.gguf"
            write_gguf(path, {**metadata, **vocabularies[vocabulary]})
            # Qwen's own tokenizer composes characters first; llama.cpp leaves that out.
            composed = [unicodedata.normalize("NFC", text) for text in texts]
            ids = reference_ids(path, composed if metadata.get("pre") == "qwen2" else texts)
        goldens[name] = {"vocabulary": vocabulary, "metadata": metadata, "ids": ids}
    goldens["smollm2"] = {"vocabulary": None, "metadata": {}, "ids": reference_ids(Path(sys.argv[1]), texts)}
    reference = f"llama.cpp in xllamacpp {version('xllamacpp')}"
    for name, value in {
        "hard_texts": texts,
        "vocabularies": vocabularies,
        "tokenizer_goldens": {"reference": reference, "cases": goldens},
    }.items():
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
        (DATA / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
