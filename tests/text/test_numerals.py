"""Numbers in Han characters read by hand, and by writing numbers out."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpler_distil_whisper.text.numerals import with_digits


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("二十三個", "23個"),
        ("二零二六年十二月三日", "2026年12月3日"),
        ("三點五和三点五", "3.5和3.5"),
        ("下午三点五十分", "下午3.50分"),  # as 3点50分 is
        ("下午3点50分", "下午3.50分"),
        ("一點五萬", "15000"),
        ("1.5万", "15000"),
        ("3.14159亿", "314159000"),
        ("十二點五萬", "125000"),
        ("一百二十三點五萬", "1235000"),
        ("三十六點五億元", "3650000000元"),
        ("二百零五点二五万", "2052500"),
        ("半百點五萬", "半百點50000"),
        ("3千5百", "3500"),
        ("兩百五", "250"),
        ("两人兩人", "2人2人"),
        ("三萬五", "35000"),
        ("三萬零五", "30005"),
        ("十萬零三百", "100300"),
        ("一千零一十", "1010"),
        ("五千萬", "50000000"),
        ("一亿两千万", "120000000"),
        ("一萬億", "1000000000000"),
        ("廿三 卅 卌一", "23 30 41"),
        ("壹萬貳仟參佰", "12300"),
        ("壹佰零伍圆", "105圆"),
        ("百分之二十", "20%"),
        ("百分之20", "20%"),
        ("百分之三點五", "3.5%"),
        ("百分之百", "100%"),
        ("五百分之一", "500分之1"),
        ("百分之五六十", "百分之56十"),
        ("百分之三零十二", "百分之30十2"),
        ("٣ и १२ ๕ ２", "3 и 12 5 2"),
        ("統一 一起", "統1 1起"),
        # What is no number keeps its units.
        ("千萬別說百姓", "千萬別說百姓"),
        ("十五六個", "十56個"),
        ("參加大陸隊伍收拾", "參加大陸隊伍收拾"),
        ("收拾三個", "收拾3個"),
        ("三點半", "3點半"),
        ("25百 2026十", "25百 2026十"),
        ("三十點零萬 卅.0万", "30點0萬 30.0万"),
        ("1.2.3万", "1.2.30000"),
        ("點點", "點點"),
        ("1,000", "1,000"),
        ("²Ⅲ", "²Ⅲ"),
        ("", ""),
    ],
)
def test_numbers_by_hand(text: str, digits: str) -> None:
    assert with_digits(text) == digits
    assert with_digits(digits) == digits


def written(number: int) -> str:
    """Write a number below 10,000 億 as it is spoken."""
    text, gap = "", False
    for place in reversed(range(12)):
        digit = number // 10**place % 10
        if digit:
            text += ("零" if gap and text else "") + "零一二三四五六七八九"[digit]
            text += ["", "十", "百", "千"][place % 4]
        gap = not digit
        group = number // 10 ** (place - place % 4) % 10_000
        if place in (4, 8) and group:
            text += "萬億"[place // 8]
    return text or "零"


@settings(max_examples=500)
@given(st.integers(0, 11).flatmap(lambda digits: st.integers(0, 10 ** (digits + 1) - 1)))
def test_numbers_written_out_are_read_back(number: int) -> None:
    assert with_digits(written(number)) == str(number)
    simplified = written(number).translate(str.maketrans("萬億", "万亿")).replace("二千", "两千")
    assert with_digits(f"共{simplified}元") == f"共{number}元"


@settings(max_examples=500)
@given(
    st.text(
        alphabet="〇零一二兩三九十百千万萬亿億点點分之廿卅壹參拾佰仟半年a 3.0,%", max_size=9
    ).map(with_digits)
)
def test_reading_twice_changes_nothing_more(once: str) -> None:
    assert with_digits(once) == once


@pytest.mark.parametrize("loop", ["一", "十", "一點", "一百", "萬", "百分之", "1.5萬", "壹", "9"])
def test_a_loop_of_numerals_takes_no_longer_than_its_length(loop: str) -> None:
    start = time.process_time()
    with_digits(loop * 20_000)
    assert time.process_time() - start < 2
