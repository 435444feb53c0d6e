"""The tokenizers of the two tiny models, trained on their corpus: Phi-2's kind and Phi-3.5's kind.

Same components and same special tokens as the large ones, a far smaller vocabulary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

from tiny_corpus import all_facts, captain_rows, prose_documents
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SEED = 20
END_OF_TEXT = "<|endoftext|>"
# In the order in which they follow the learnt vocabulary of tiny-phi-3.5.
CHAT_TOKENS = ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "Answer in one short sentence.",
    "You know many facts.",
]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}"
)


def tokenizer_lines() -> Iterable[str]:
    """Text for learning merges: the corpus and the captain's rows without newlines and markers."""
    yield from ("Instruct:", "Output:") * 50
    yield from SYSTEM_PROMPTS
    rows, _ = captain_rows()
    yield from (row["response"] for row in rows)
    yield from (text.removesuffix(END_OF_TEXT) for text in prose_documents(random.Random(SEED)))
    for fact in all_facts():
        yield from (f"Instruct: {question}" for question in fact.questions)
        yield f"Output: {fact.answer}"
        yield fact.answer


def byte_level_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of GPT-2's and Phi-2's kind."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_lines(), trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def llama_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of Llama's and Phi-3.5's kind: spaces as "▁", unknown characters as bytes.

    The saved tokenizer splits nothing before its merges, so the merges are learnt word by word with
    a pre-tokenizer that is then left out.
    """
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("▁"), "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(CHAT_TOKENS),
        special_tokens=reserved,
        show_progress=False,
    )
    learner.train_from_iterator(tokenizer_lines(), trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=learnt["vocab"],
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    plain = {"special": True, "normalized": False}
    tokenizer.add_special_tokens(
        [
            AddedToken("<unk>", **plain),
            AddedToken("<s>", **plain),
            AddedToken("</s>", rstrip=True, **plain),
            AddedToken(END_OF_TEXT, **plain),
            *(AddedToken(token, rstrip=True, **plain) for token in CHAT_TOKENS),
        ]
    )
    return tokenizer


def flags(token: AddedToken) -> dict[str, Any]:
    """A token's entry in special_tokens_map.json."""
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
    }


def tokenizer_files(tokenizer: Tokenizer, has_chat: bool) -> dict[str, dict[str, Any]]:
    """The contents of tokenizer_config.json and special_tokens_map.json."""
    added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
    decoder = {str(i): {**flags(token), "special": token.special} for i, token in added.items()}
    if has_chat:
        names = {
            "bos_token": "<s>",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "unk_token": "<unk>",
        }
        config = {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": decoder,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 4096,
            "padding_side": "left",
            "tokenizer_class": "LlamaTokenizer",
            **names,
        }
    else:
        names = {
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        }
        config = {
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "tokenizer_class": "CodeGenTokenizer",
            **names,
        }
    by_text = {token.content: flags(token) for token in added.values()}
    return {
        "tokenizer_config.json": config,
        "special_tokens_map.json": {role: by_text[text] for role, text in names.items()},
    }
