"""Explanations of JSON errors, for people who wrote JSON by hand or printed it from Python.

explain("Expecting value", before='"image": [', text="True]")
→ "unexpected True; write true in JSON"
"""

import re

OTHER_WORDS = {"None": "null", "True": "true", "False": "false", "TRUE": "true", "FALSE": "false"}
OTHER_WORDS |= dict.fromkeys(("nan", "NAN", "NULL", "Null", "undefined"), "null")
OTHER_QUOTES = "'`‘’“”"
TOKEN = re.compile(r'"[^"]*"?|[\w.]+|.', re.DOTALL)


def explain(message: str, before: str, text: str, is_line: bool = False) -> str:
    """The text at which Python's JSON parser stopped, and how to fix it.

    Args:
        message: the parser's `msg`.
        before, text: the text before and after the position of the error.
        is_line: the text is a line of JSON Lines, not a file with an array.
    """
    if message.startswith("Unterminated string"):
        return "the string that starts here is not closed; end it with a double quote"
    if not (match := TOKEN.match(text)):
        if is_line:
            return "the line ends within the record; write a record on one line, or all in one array: [ … ]"
        return "the file ends within the record; close its brackets and braces, or check for missing text"
    token, char = f"{match[0]:.40}", repr(text[0])
    if message.startswith("Invalid control character"):
        return f"unexpected {char} in a string; write \\n for the end of a line and \\t for a tab"
    if message.startswith("Invalid \\u"):
        return f"unexpected \\{text[:5]} in a string; \\u needs four hexadecimal digits"
    if message.startswith("Invalid \\"):
        return f"unexpected {text[:2]} in a string; write a backslash twice: \\\\"
    if message == "Extra data":
        return f"unexpected {token} after the record; a line of JSON Lines is one record and nothing else"
    if text[0] in OTHER_QUOTES:
        return f'unexpected {char}; JSON needs double quotes (")'
    follows_a_comma = before.rstrip().endswith(",") and text[0] in "]}"
    if follows_a_comma or message.startswith("Illegal trailing comma"):
        return f"unexpected {char}; remove the trailing comma"
    if token in OTHER_WORDS:
        return f"unexpected {token}; write {OTHER_WORDS[token]} in JSON"
    if text[0] in "/#":
        return f"unexpected {char}; JSON has no comments: remove it"
    if "',' delimiter" in message:
        is_in_text = before.endswith('"') and text[0] != '"'
        quote = ', or the double quote before it is part of a text and needs a backslash (\\")'
        return f"a comma is missing before {token}{quote if is_in_text else ''}"
    if "':' delimiter" in message:
        return f"unexpected {token}; a key must be followed by a colon"
    wanted = "a value" if "value" in message else "a key in double quotes"
    return f"unexpected {token}; expected {wanted}"
