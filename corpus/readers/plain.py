"""Files that are one document each: plain text, and source code, whose language is known by the suffix."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from corpus.readers.compression import COMPRESSIONS, Damaged, blocks, without_mark
from corpus.readers.rows import BadRow, CodeDocument, Document, decode

LANGUAGES = {
    "Ada": ".adb .ads",
    "Assembly": ".asm .s",
    "C": ".c .h",
    "C#": ".cs",
    "C++": ".cc .cpp .cxx .hh .hpp .hxx .ipp",
    "CMake": ".cmake CMakeLists.txt",
    "CSS": ".css .less .scss",
    "Clojure": ".clj .cljs",
    "Common Lisp": ".cl .lisp",
    "CUDA": ".cu .cuh",
    "Cython": ".pyx .pxd",
    "Dart": ".dart",
    "Dockerfile": ".dockerfile Dockerfile",
    "Elixir": ".ex .exs",
    "Elm": ".elm",
    "Erlang": ".erl .hrl",
    "F#": ".fs .fsx",
    "Fortran": ".f .f90 .f95 .f03 .f08",
    "GLSL": ".glsl .vert .frag",
    "Go": ".go",
    "GraphQL": ".graphql",
    "Groovy": ".gradle .groovy",
    "HTML": ".htm .html",
    "Haskell": ".hs .lhs",
    "Java": ".java",
    "JavaScript": ".cjs .js .jsx .mjs",
    "Julia": ".jl",
    "Kotlin": ".kt .kts",
    "Lean": ".lean",
    "Lua": ".lua",
    "MATLAB": ".m",
    "Makefile": ".mk Makefile makefile GNUmakefile",
    "Markdown": ".md .markdown",
    "Nix": ".nix",
    "OCaml": ".ml .mli",
    "PHP": ".php",
    "Pascal": ".pas .pp",
    "Perl": ".pl .pm",
    "PowerShell": ".ps1 .psm1",
    "Prolog": ".pro",
    "Protocol Buffers": ".proto",
    "Python": ".py .pyi",
    "R": ".r .R",
    "Ruby": ".rb",
    "Rust": ".rs",
    "SQL": ".sql",
    "Scala": ".scala .sc",
    "Scheme": ".scm .ss",
    "Shell": ".bash .sh .zsh",
    "Solidity": ".sol",
    "Swift": ".swift",
    "SystemVerilog": ".sv .svh",
    "TOML": ".toml",
    "TeX": ".tex .sty .bib",
    "Terraform": ".tf",
    "TypeScript": ".ts .tsx",
    "VHDL": ".vhd .vhdl",
    "Verilog": ".v .vh",
    "Vue": ".vue",
    "XML": ".xml .xsl",
    "YAML": ".yaml .yml",
    "Zig": ".zig",
    "reStructuredText": ".rst",
}
"""Of source code and what lies beside it: suffixes, and names of files without one."""
_LANGUAGE_OF = {ending: language for language, endings in LANGUAGES.items() for ending in endings.split()}
CODE_SUFFIXES = tuple(ending for ending in _LANGUAGE_OF if ending.startswith("."))
CODE_NAMES = tuple(ending for ending in _LANGUAGE_OF if not ending.startswith("."))
_LOOKED_AT = 8192
"""Bytes in which a NUL tells a binary file, as git does it."""


def language_of(path: str) -> str | None:
    """The programming language that the name of a file tells."""
    name = PurePosixPath(path).name
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = PurePosixPath(name).suffix
    return _LANGUAGE_OF.get(name) or _LANGUAGE_OF.get(suffix) or _LANGUAGE_OF.get(suffix.lower())


def read_text(path: str, text_key: str) -> Iterator[Document | BadRow]:
    """All of a file, unless it is binary."""
    content = _content(path)
    yield binary(content) or Document(*decode(content), done=1.0)


def read_code(path: str, text_key: str) -> Iterator[Document | BadRow]:
    """All of a file, unless it is binary: a .ts file may be a film."""
    content = _content(path)
    yield binary(content) or CodeDocument(*decode(content), done=1.0, written_in=language_of(path))


def binary(content: bytes) -> BadRow | None:
    """Why the content of a file is no text, if it is none."""
    return BadRow("", "is binary, or UTF-16: it has NUL bytes") if b"\0" in content[:_LOOKED_AT] else None


def _content(path: str) -> bytes:
    try:
        return without_mark(b"".join(block for block, _ in blocks(path)), path)
    except Damaged as error:
        raise ValueError(f"{path} is damaged: {error}") from error
