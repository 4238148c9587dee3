"""Text of others on a terminal."""


def visible(text: str) -> str:
    """The text with every control, format and other unprintable character as its escape, line breaks excepted. What a
    model writes, or a file is called, must not reach a terminal's controls."""
    shown = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


def one_line(text: str) -> str:
    """`visible`, with line breaks as escapes too: a name in a table or in a message."""
    return visible(text).replace("\n", "\\n")
