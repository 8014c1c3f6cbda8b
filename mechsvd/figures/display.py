"""Make text from outside, such as prompts and names, safe to show and to use in file names."""

import html
import re
import unicodedata

JOINERS = "\u200c\u200d"  # some letters and emoji need them
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode: controls, formats, surrogates, separators


def visible(text: str) -> str:
    r"""Write out control characters, such as those that change the text's direction.

    Line breaks, tabs and joiners stay.

    Example:
        >>> visible("safe\u202etxt.exe")
        'safe\\u202etxt.exe'
    """
    return "".join(_written_out(c) if _is_hidden(c) else c for c in text)


def escape(text: str) -> str:
    """Escape text for HTML, also inside quotes."""
    return html.escape(visible(text))


def label(text: str) -> str:
    """Escape text for plotly: no tags, no links and no values filled in."""
    shown = html.escape(visible(text), quote=False)  # plotly does not decode &quot;
    return shown.replace("%{", "%&#123;")


def file_name(name: str) -> str:
    """Encode a name as one file name; different names stay different, usual names stay."""
    return re.sub(r"^_|[^\w-]", lambda match: f"%{ord(match[0]):02X}", name) or "%"


def _is_hidden(character: str) -> bool:
    return character not in f"\n\t{JOINERS}" and unicodedata.category(character) in HIDDEN


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
