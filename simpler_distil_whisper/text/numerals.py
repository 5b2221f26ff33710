"""Numbers in Han characters, and the digits of all scripts, written as 0-9."""

import re
import unicodedata
from decimal import Decimal

# The largest first: a number is split at its largest unit.
UNITS = {"億": 10**8, "萬": 10**4, "千": 1000, "百": 100, "十": 10}
SAME_UNIT = str.maketrans({"亿": "億", "万": "萬", "仟": "千", "佰": "百"})
SMALL_UNIT = "十百佰千仟"
UNIT = SMALL_UNIT + "万萬亿億"
LONGEST_NUMBER = 40  # characters; longer runs are no numbers, and Python reads up to 4300 digits

HAN_DIGITS = {
    **dict(zip("〇一二三四五六七八九", "0123456789", strict=True)),
    "零": "0",
    "两": "2",
    "兩": "2",
    "廿": "2十",
    "卅": "3十",
    "卌": "4十",
}
# Numerals of cheques. Most are also parts of words (參加, 大陸, 收拾), but not side by side.
FORMAL_DIGITS = str.maketrans("壹贰貳叁叄参參肆伍陆陸柒捌玖拾", "12233334566789十")
FORMAL = "壹贰貳叁叄参參肆伍陆陸柒捌玖"
FORMAL_NUMERAL = re.compile(
    rf"(?<=[{FORMAL}拾佰仟零])[{FORMAL}]|[{FORMAL}](?=[{FORMAL}拾佰仟万萬亿億])"
    rf"|(?<=[{FORMAL}])拾|拾(?=[{FORMAL}])"
)

SCALED_DECIMAL = re.compile(
    rf"(?<![0-9.点點{UNIT}])([0-9{SMALL_UNIT}]{{1,15}})[.点點](?=0*[1-9])([0-9]{{1,10}})([万萬]?[亿億]|[万萬])"
    rf"(?![0-9{UNIT}])"
)
NUMBER = re.compile(rf"[0-9{UNIT}]+")
POINT = re.compile(rf"(?<=[0-9])[点點](?=[0-9]+(?![0-9{UNIT}]))")
PERCENT = re.compile(rf"(?<![0-9{UNIT}])百分之(百|[0-9]+(?:\.[0-9]+)?)(?!\.?[0-9{UNIT}])")


class _DigitTable(dict[int, str]):
    """A table for `str.translate` that looks up each character's decimal value once."""

    def __missing__(self, code_point: int) -> str:
        character = chr(code_point)
        value = unicodedata.decimal(character, None)
        self[code_point] = HAN_DIGITS.get(character, character) if value is None else str(value)
        return self[code_point]


DIGITS = _DigitTable()


def with_digits(text: str) -> str:
    """Return the text with its numbers in 0-9: 二十三 as 23, 三點五 as 3.5, 1.5萬 as 15000.

    百分之五 becomes 5%. Han digits are converted everywhere, also in words (一起); units that form
    no number (千萬, 十五六) stay as they are.
    """
    text = FORMAL_NUMERAL.sub(lambda match: match[0].translate(FORMAL_DIGITS), text)
    text = SCALED_DECIMAL.sub(_scaled, text.translate(DIGITS))
    text = POINT.sub(".", NUMBER.sub(_in_digits, text))
    return PERCENT.sub(lambda match: f"{match[1].replace('百', '100')}%", text)


def _scaled(match: re.Match[str]) -> str:
    whole = _value(match[1].translate(SAME_UNIT))
    if whole is None:
        return match[0]
    value = Decimal(f"{whole}.{match[2]}")
    for unit in match[3].translate(SAME_UNIT):
        value *= UNITS[unit]
    return f"{value.normalize():f}"


def _in_digits(match: re.Match[str]) -> str:
    run = match[0]
    if run.isdecimal() or len(run) > LONGEST_NUMBER:
        return run
    value = _value(run.translate(SAME_UNIT))
    return run if value is None else str(value)


def _value(number: str) -> int | None:
    """Return the value of digits and units, or None if they form no number."""
    unit = next((unit for unit in UNITS if unit in number), None)
    if unit is None:
        return int(number) if number else None
    size = UNITS[unit]
    before, _, after = number.partition(unit)
    times = 1 if unit == "十" and not before else _value(before)
    rest = _value(after.lstrip("0")) if after.strip("0") else 0
    if not times or rest is None or (times > 9 and size < UNITS["萬"]):
        return None
    if len(after) == 1 and size > 10:  # 兩百五 is 250
        rest *= size // 10
    return times * size + rest if rest < size else None
