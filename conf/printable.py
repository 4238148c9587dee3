"""Escapes untrusted text for a terminal."""


def visible(text: str) -> str:
    """The text with all control, format and other unprintable characters escaped, except line breaks: generated text
    and file names must not contain terminal control sequences."""
    shown = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


def one_line(text: str) -> str:
    """`visible` with line breaks escaped too, for names in tables and messages."""
    return visible(text).replace("\n", "\\n")
