"""The folder of a Hugging Face tokenizer without a tokenizer.json, such as vocab.json with merges.txt, vocab.txt or a
SentencePiece model with the tokens that its class adds: Transformers loads and converts it, and the result has to give
the same ids on a sample of text."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import tokenizers

SUFFIXES = (".bpe", ".json", ".model", ".spm", ".tiktoken", ".txt", ".vocab")
"""Of the files that a tokenizer is made of."""
SAMPLE = (
    "The quick brown fox jumps over the lazy dog. It's 12,345.67 metres -- isn't it?\n\n\tfor (i = 0; i < n; ++i) {\r\n"
    "        x[i] += 0x1F; // half-open   [0, n)\n    }\n  \n\n\n def f(self, *args, **kwargs):  return {'a': \"b\"}\n",
    " Ein leerer Anfang, Übergrößenträger, façade, Ελληνικά, Русский язык, עברית, العربية, हिन्दी, ไทย",
    "日本語のテキスト, 한국어。 e\u0301 A\u030a ½ ² ﬁ ① \u00a0\u200b\u3000 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \ufffd",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa",
    'https://example.org/a_b-c?d=e%20f&g#h <p class="x">1 &lt; 2</p> \\frac{a}{b} $x^2$ CamelCase snake_case ALLCAPS',
    "    ",
    "\n",
    "a",
)
_FEW = 32
"""Different ids in the sample, below which it is not the text of a vocabulary: Transformers makes a tokenizer of three
tokens where it finds none."""


def convert(folder: str) -> tokenizers.Tokenizer:
    """
    Raises:
        ValueError: Transformers is not installed, cannot load or convert the tokenizer, or the converted one gives
            other ids.
    """
    try:
        from transformers import AutoTokenizer
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer
    except ImportError as error:
        raise ValueError(f"Transformers, which would convert it, is not installed ({error})") from error
    with contextlib.redirect_stderr(io.StringIO()):  # advice about its own arguments
        try:
            theirs: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever loading raises for files that are missing, invalid or code
            raise ValueError(f"Transformers cannot load it: {_first_line(error)}") from error
        name = type(theirs).__name__
        try:
            converted = getattr(theirs, "backend_tokenizer", None) or convert_slow_tokenizer(theirs)
        except Exception as error:  # there is no converter for the class
            raise ValueError(f"Transformers has no conversion of {name}, which is written in Python") from error
        inner = tokenizers.Tokenizer.from_str(converted.to_str())
        inner.no_truncation()
        inner.no_padding()
        if len({i for text in SAMPLE for i in inner.encode(text, add_special_tokens=False).ids}) < _FEW:
            raise ValueError(f"Transformers finds no vocabulary for {name} in it")
        for text in SAMPLE:
            expected = theirs.encode(text, add_special_tokens=False)
            found = inner.encode(text, add_special_tokens=False).ids
            if found != expected:
                at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
                raise ValueError(
                    f"the conversion of {name} gives other ids than itself for {text[:40]!r}, from token {at} on: "
                    f"{found[at : at + 3]} instead of {expected[at : at + 3]}"
                )
    return inner


def files_of(folder: str) -> list[Path]:
    """The files of a folder that a tokenizer may be made of, sorted."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIXES))
    return [path for name in names if (path := Path(folder, name)).is_file()]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
