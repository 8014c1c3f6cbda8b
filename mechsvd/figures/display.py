"""Text from outside, such as prompts and names, made harmless where it is shown or names a file."""

import html
import re
import unicodedata

JOINERS = "\u200c\u200d"  # which letters and emoji need
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # in Unicode: controls, formats, surrogates, separators


def visible(text: str) -> str:
    r"""Text with its control characters written out, such as those that turn its direction.

    Line breaks, tabs and joiners stay.

    Example:
        >>> visible("safe\u202etxt.exe")
        'safe\\u202etxt.exe'
    """
    return "".join(_written_out(c) if _is_hidden(c) else c for c in text)


def escape(text: str) -> str:
    """Text that is safe in HTML, in quotes too."""
    return html.escape(visible(text))


def label(text: str) -> str:
    """Text that a plotly figure shows as it is: no tags, no links, no values filled in."""
    shown = html.escape(visible(text), quote=False)  # plotly knows no &quot;
    return shown.replace("%{", "%&#123;")


def file_name(name: str) -> str:
    """A name as a single file name, another one for every other name; usual names stay."""
    return re.sub(r"^_|[^\w-]", lambda found: f"%{ord(found[0]):02X}", name) or "%"


def _is_hidden(character: str) -> bool:
    return character not in f"\n\t{JOINERS}" and unicodedata.category(character) in HIDDEN


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
