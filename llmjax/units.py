"""Numbers as people read them, each with its unit. A missing number (None or NaN) is an en dash."""

import math
from typing import TypeGuard

MISSING = "–"


def _there(value: float | None) -> TypeGuard[float]:
    return value is not None and not math.isnan(value)


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands separated: 1.87, 0.0123, 12,300."""
    if not _there(value):
        return MISSING
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}" if decimals < 7 else f"{value:.{digits - 1}e}"


def count(value: float | None) -> str:
    """A count with an SI letter: 950, 12.3 k, 6.10 M, 1.70 G, up to Z for FLOPs."""
    if not _there(value):
        return MISSING
    for scale, letter in ((1e21, " Z"), (1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= scale:
            return number(value / (1e3 if letter == " k" else scale)) + letter
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes as "950 B", "12.3 kB" or "1.70 GB"."""
    shown = count(value)
    return shown if shown == MISSING else f"{shown}B" if " " in shown else f"{shown} B"


def percent(value: float | None) -> str:
    """A fraction as "91.8 %"."""
    return f"{100 * value:.1f} %" if _there(value) else MISSING


def seconds(value: float | None) -> str:
    """A duration in seconds as "8.2 s", "4 min 50 s" or "2 h 05 min"."""
    if not _there(value):
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def with_error(value: float | None, error: float | None, digits: int = 2) -> str:
    """`value ± error`, both to the last of `digits` digits of the error: "0.812 ± 0.011". No error is none, nor is rounding."""
    if not _there(value) or not _there(error) or error <= 1e-9 * abs(value):
        return number(value)
    decimals = min(6, max(0, digits - 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def words(name: str) -> str:
    """A name as words: "instruction_following" -> "Instruction following"."""
    return name.replace("_", " ").replace("/", ": ").capitalize()


def with_unit(text: str, unit: str) -> str:
    """`text` and its unit, or the dash alone."""
    return text if text == MISSING or not unit else f"{text} {unit}"


COUNTED = ("parameters", "tokens", "FLOPs", "documents", "examples", "dialogues", "prompts", "rankings", "steps")


def text(value: float | None, unit: str, error: float | None = None) -> str:
    """A number with its unit, as people read it, and its standard error if there is one.

    "%" and what begins with it shows a fraction as per cent; the units of COUNTED are counts; "B" are bytes; "s" is a duration.
    """
    if not _there(value):
        return MISSING
    if unit.startswith("%"):
        shown = percent(value) if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"
        return with_unit(shown, unit[1:].strip())
    if unit in COUNTED:
        return with_unit(count(value), unit)
    if unit == "B":
        return size(value)
    if unit == "s":
        return seconds(value)
    return with_unit(with_error(value, error), unit)
