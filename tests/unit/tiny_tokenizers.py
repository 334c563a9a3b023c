"""Tokenizers small enough to be made inside a test: byte-level BPE, words, and a slow one that splits characters."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<unk>", "<|turn|>", "<|end|>"]
CORPUS = [
    "Question: what is a fever? Answer: a fever is a raised temperature.",
    "Question: what helps a cough? Answer: honey and rest help a cough. yes no maybe",
]
CHATML = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|turn|>{{ m['content'] | trim }}</s>{% endfor %}"
)
# Shows only the last answer as it is; earlier ones lose their first word.
REWRITING = (
    "<s>{% for m in messages %}{{ m['role'] }}: {% if loop.last or m['role'] == 'user' %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split(' ', 1)[1] }}{% endif %}</s>{% endfor %}"
)


@cache
def bpe(bos: bool = True, chat: str | None = None, eos: str | None = "</s>", trim: bool = True) -> Any:
    """Byte-level BPE: any text round-trips. With `bos`, its post-processor puts `<s>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=chat)


@cache
def ended() -> Any:
    """Words, with a post-processor that puts `</s>` behind every text, as some encoders' tokenizers do."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIALS, "a", "b", "c"])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


class Characters(PreTrainedTokenizer):
    """A slow tokenizer, without offsets: one token a character, but " y" is one of its own."""

    def __init__(self, **options: Any) -> None:
        self.words = ["</s>", *(chr(code) for code in range(10, 127)), " y"]
        super().__init__(eos_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return _split(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def _split(text: str) -> list[str]:
    tokens: list[str] = []
    for character in text:
        if character == "y" and tokens and tokens[-1] == " ":
            tokens[-1] = " y"
        else:
            tokens.append(character)
    return tokens
