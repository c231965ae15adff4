"""What is wrong with text that is not JSON, for people who wrote it by hand or printed it from Python.

explain("Expecting value", before='"image": ', text="['cat.jpg']")
→ 'a single quote stands there; JSON needs double quotes (")'
"""

import re

OTHER_WORDS = {"None": "null", "True": "true", "False": "false", "TRUE": "true", "FALSE": "false"}
OTHER_WORDS |= dict.fromkeys(("nan", "NAN", "NULL", "Null", "undefined"), "null")
OTHER_QUOTES = "'`‘’“”"
TOKEN = re.compile(r'"[^"]*"?|[\w.]+|.', re.DOTALL)


def explain(message: str, before: str, text: str, is_line: bool = False) -> str:
    """What stands where Python's JSON parser gave up, and what to do.

    Args:
        message: the parser's `msg`.
        before, text: what stands before that place, and from there on.
        is_line: the text is a line of JSON Lines, not a file with a list.
    """
    if message.startswith("Unterminated string"):
        return "the string that begins there has no end; close it with a double quote"
    if not (match := TOKEN.match(text)):
        if is_line:
            return "the line ends within the record; write a record on one line, or all in one list: [ … ]"
        return "the file ends within the record; close brackets and braces, or look for what is missing"
    token, char = f"{match[0]:.40}", repr(text[0])
    if message.startswith("Invalid control character"):
        return f"{char} stands within a string; write \\n for the end of a line and \\t for a tab"
    if message.startswith("Invalid \\u"):
        return f"\\{text[:5]} stands within a string; \\u needs four hexadecimal digits"
    if message.startswith("Invalid \\"):
        return f"{text[:2]} stands within a string; write a backslash twice: \\\\"
    if message == "Extra data":
        return f"{token} follows the record on its line; a line of JSON Lines is one record and nothing else"
    if text[0] in OTHER_QUOTES:
        return f'{char} stands there; JSON needs double quotes (")'
    follows_a_comma = before.rstrip().endswith(",") and text[0] in "]}"
    if follows_a_comma or message.startswith("Illegal trailing comma"):
        return f"{char} stands there; remove the trailing comma"
    if token in OTHER_WORDS:
        return f"{token} stands there; JSON writes {OTHER_WORDS[token]}"
    if text[0] in "/#":
        return f"{char} stands there; JSON has no comments: remove it"
    if "',' delimiter" in message:
        is_in_text = before.endswith('"') and text[0] != '"'
        quote = ', or the double quote before it belongs to a text and needs a backslash (\\")'
        return f"a comma is missing before {token}{quote if is_in_text else ''}"
    if "':' delimiter" in message:
        return f"{token} stands there; a key needs a colon behind it"
    wanted = "a value" if "value" in message else "a key in double quotes"
    return f"{token} stands where {wanted} should"
