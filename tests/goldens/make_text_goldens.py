"""Makes the goldens of tests/text that come from `transformers`: tokenizers of folders, and chat templates.

Two small Hugging Face folders are written into tests/text/data from the toy vocabularies (one as Llama 3 and one as
Llama 2 ship their tokenizers), loaded by transformers and asked for ids and texts; each chat template of
chat_cases.json is rendered for each conversation with each set of options. Run after make_tokenizer_goldens.py, with
transformers and tokenizers installed:

    python tests/goldens/make_text_goldens.py
"""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent.parent / "text" / "data"


def read(name: str) -> object:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def write(path: Path, value: object) -> None:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def llama3_folder(vocabulary: dict[str, list[object]]) -> Path:
    folder = DATA / "llama3_folder"
    folder.mkdir(exist_ok=True)
    tokens = vocabulary["tokens"]
    merges = [tuple(merge.split(" ")) for merge in vocabulary["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=True))
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens[-2:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "special": True, "normalized": False},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "chat_template": [
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
            {"name": "tool_use", "template": "tools:{{ tools | length }}"},
        ],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write(folder / "tokenizer_config.json", config)
    return folder


def llama2_folder(vocabulary: dict[str, list[object]]) -> Path:
    folder = DATA / "llama2_folder"
    folder.mkdir(exist_ok=True)
    tokens, types = vocabulary["tokens"], vocabulary["token_type"]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token, kind in zip(tokens, types, strict=True)
        if kind == 1
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {str(ids["<tool>"]): {"content": "<tool>", "special": False, "normalized": False}},
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text("[INST] {{ messages[0].content }} [/INST]", encoding="utf-8")
    return folder


def folder_golden(folder: Path, texts: list[str]) -> dict[str, object]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rng = random.Random(3)
    samples = [[rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 12))] for _ in range(200)]
    return {
        "ids": [tokenizer.encode(text) for text in texts],
        "plain_ids": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "samples": samples,
        "decoded": [tokenizer.decode(ids) for ids in samples],
        "decoded_without_special": [tokenizer.decode(ids, skip_special_tokens=True) for ids in samples],
    }


def chat_goldens(folder: Path) -> list[dict[str, object]]:
    """Texts, or null where transformers refuses the conversation."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    cases = read("chat_cases")
    goldens = []
    for template, source in cases["templates"].items():
        for conversation, messages in cases["conversations"].items():
            for option, options in cases["options"].items():
                try:
                    text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
                except Exception:  # Templates raise whatever Python raises.
                    text = None
                goldens.append({"template": template, "conversation": conversation, "options": option, "text": text})
    return goldens


def main() -> None:
    texts, vocabularies = read("hard_texts"), read("vocabularies")
    llama3 = llama3_folder(vocabularies["byte_level"])
    folders = [llama3, llama2_folder(vocabularies["sentence_piece"])]
    goldens = {
        "reference": f"transformers {version('transformers')}, tokenizers {version('tokenizers')}",
        "special_tokens": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        "folders": {folder.name: folder_golden(folder, texts) for folder in folders},
        "chats": chat_goldens(llama3),
    }
    write(DATA / "text_goldens.json", goldens)


if __name__ == "__main__":
    main()
