"""Numbers and settings as a reader wants them: short, with a unit, never more digits than they carry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

MISSING = "–"
_UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_WORDS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def percent(value: float, digits: int = 2) -> str:
    """A fraction in per cent.

    >>> percent(0.8703), percent(float("nan"))
    ('87.03\\u202f%', '–')
    """
    return f"{100 * value:.{digits}f}\u202f%" if math.isfinite(value) else MISSING


def decimal(value: float | None, digits: int) -> str:
    """A plain number with fixed digits; a dash when there is none."""
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else MISSING


def significant(value: float, digits: int = 4) -> str:
    """A number of any size: whole numbers in full, others with some significant digits, or as a power of ten.

    >>> significant(0.123456), significant(12), significant(1.5e-11), significant(2.5e9), significant(0.001)
    ('0.1235', '12', '1.50·10⁻¹¹', '2.50·10⁹', '0.001')
    """
    if not math.isfinite(value):
        return MISSING
    exponent = _exponent(value)
    if not -4 < exponent < 6:
        mantissa = f"{value / 10.0**exponent:.2f}".removesuffix(".00")
        return f"{'' if mantissa == '1' else mantissa + '·'}10{_raised(exponent)}".replace("-", "−")
    shown = f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    return (shown.rstrip("0").rstrip(".") if "." in shown and float(value) == round(value, 3) else shown).replace(
        "-", "−"
    )


def plus_minus(mean: float, deviation: float) -> str:
    """A mean with its deviation, which gives two digits; without one where it is not a number.

    >>> plus_minus(0.8712, 0.0213), plus_minus(1.234e-11, 2e-12), plus_minus(12, math.nan), plus_minus(3, 0.0)
    ('0.871 ± 0.021', '(1.23 ± 0.20)·10⁻¹¹', '12', '3 ± 0')
    """
    if not math.isfinite(mean) or not math.isfinite(deviation):
        return significant(mean)
    if deviation == 0:
        return f"{significant(mean)} ± 0"
    exponent = max(_exponent(mean), _exponent(deviation))
    scaled = not -4 < exponent < 6
    scale = 10.0**exponent if scaled else 1.0
    digits = max(1 - _exponent(deviation / scale), 0)
    shown = f"{mean / scale:,.{digits}f} ± {deviation / scale:,.{digits}f}"
    return (f"({shown})·10{_raised(exponent)}" if scaled else shown).replace("-", "−")


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def count(value: float, unit: str = "") -> str:
    """A large number with three digits and an SI prefix.

    >>> count(405_234), count(5.2e9, "FLOP")
    ('405\\u202fk', '5.20\\u202fGFLOP')
    """
    if not math.isfinite(value):
        return MISSING
    for scale, letter in _UNITS:
        if value >= 0.9995 * scale:
            scaled = value / scale
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}\u202f{letter}{unit}"
    return f"{value:.0f}\u202f{unit}".rstrip("\u202f")


def evals(value: float) -> str:
    """Layer evaluations in words, e.g. "520 million"."""
    if not math.isfinite(value):
        return MISSING
    scale, word = axis_scale(value)
    digits = 2 if value / scale < 9.995 else 1 if value / scale < 99.95 else 0
    return f"{value / scale:.{digits}f} {word.removesuffix('s')}" if word else f"{value:.0f}"


def axis_scale(largest: float) -> tuple[float, str]:
    """Divisor of an axis that ends at `largest`, and its name ("millions"); (1, "") below a thousand."""
    return next(((scale, word) for scale, word in _WORDS if largest >= 0.9995 * scale), (1.0, ""))


def duration(seconds: float) -> str:
    """Time in its two largest units.

    >>> duration(83.2), duration(7380), duration(0.42)
    ('1 min 23 s', '2 h 3 min', '0.42 s')
    """
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def setting(value: object, name: str = "") -> str:
    """A configuration value as it would be written on a command line; what is called a size has a × between its two.

    >>> setting((28, 28), "image_size"), setting((2, 2), "buffers")
    ('28 × 28', '2, 2')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (
            " × ".join(setting(item) for item in value)
            if _is_size(value) and name.endswith("size")
            else ", ".join(setting(item) for item in value)
        )
    return value if isinstance(value, str) else json.dumps(value, default=str)


def settings(options: Mapping[str, object], leave_out: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Name and value of each option, as text."""
    return [(name, setting(value, name)) for name, value in options.items() if name not in leave_out]


def plural(number: float, noun: str) -> str:
    """A whole number with its noun.

    >>> plural(1, "seed"), plural(3, "seed"), plural(4, "branch")
    ('1 seed', '3 seeds', '4 branches')
    """
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,.0f} {noun}{ending}"


def _is_size(value: Sequence[object]) -> bool:
    return len(value) == 2 and all(isinstance(item, int) for item in value)
