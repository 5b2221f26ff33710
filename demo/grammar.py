"""Small combinatorial grammars of spoken requests in Mandarin and English.

Every Mandarin word carries its own numbered pinyin, because the synthesizer guesses the readings
of polyphonic characters (重, 行, 乐) and the tone of 一 wrongly when it is given characters.
"""

from __future__ import annotations

import functools
import hashlib
import random
import unicodedata
from dataclasses import dataclass

LANGUAGES = ("zh", "en")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# word:pinyin, syllables joined by underscores.
_LEXICON = """
打开:da3_kai1 关闭:guan1_bi4 关掉:guan1_diao4 请:qing3 帮我:bang1_wo3 麻烦你:ma2_fan5_ni3 的:de5
客厅:ke4_ting1 卧室:wo4_shi4 厨房:chu2_fang2 书房:shu1_fang2 阳台:yang2_tai2 浴室:yu4_shi4
灯:deng1 空调:kong1_tiao2 电视:dian4_shi4 窗帘:chuang1_lian2 风扇:feng1_shan4
音箱:yin1_xiang1 热水器:re4_shui3_qi4 把:ba3 调到:tiao2_dao4 度:du4
今天:jin1_tian1 明天:ming2_tian1 后天:hou4_tian1 早上:zao3_shang5 上午:shang4_wu3
中午:zhong1_wu3 下午:xia4_wu3 晚上:wan3_shang5 点:dian3 半:ban4 分:fen1 一刻:yi2_ke4
叫我:jiao4_wo3 提醒我:ti2_xing3_wo3 起床:qi3_chuang2 开会:kai1_hui4 吃饭:chi1_fan4
上班:shang4_ban1 上课:shang4_ke4 回家:hui2_jia1 我要:wo3_yao4 我想:wo2_xiang3
年:nian2 月:yue4 日:ri4 号:hao4 星期:xing1_qi1 天:tian1 是:shi4
北京:bei3_jing1 上海:shang4_hai3 广州:guang3_zhou1 深圳:shen1_zhen4 杭州:hang2_zhou1
南京:nan2_jing1 成都:cheng2_du1 武汉:wu3_han4 西安:xi1_an1 重庆:chong2_qing4
天津:tian1_jin1 苏州:su1_zhou1 天气:tian1_qi4 怎么样:zen3_me5_yang4 会:hui4 下雨:xia4_yu3
下雪:xia4_xue3 刮风:gua1_feng1 吗:ma5 多少度:duo1_shao5_du4 冷不冷:leng3_bu5_leng3
热不热:re4_bu5_re4 给:gei3 妈妈:ma1_ma5 爸爸:ba4_ba5 老师:lao3_shi1 小王:xiao3_wang2
老李:lao2_li3 医生:yi1_sheng1 奶奶:nai3_nai5 打电话:da3_dian4_hua4 发短信:fa1_duan3_xin4
发邮件:fa1_you2_jian4 从:cong2 到:dao4 火车票:huo3_che1_piao4 机票:ji1_piao4
多少钱:duo1_shao5_qian2 买:mai3 订:ding4 张:zhang1 两:liang3 播放:bo1_fang4
音乐:yin1_yue4 新闻:xin1_wen2 故事:gu4_shi5 第:di4 首:shou3 歌:ge1 个:ge4 我:wo3
我的:wo3_de5 电话号码:dian4_hua4_hao4_ma3 一共:yi2_gong4 块:kuai4 住在:zhu4_zai4
房间:fang2_jian1 楼:lou2 现在:xian4_zai4 几点:ji2_dian3 了:le5 去:qu4 怎么走:zen3_me5_zou3
医院:yi1_yuan4 学校:xue2_xiao4 银行:yin2_hang2 公园:gong1_yuan2 车站:che1_zhan4
机场:ji1_chang3 图书馆:tu2_shu1_guan3 离这里:li2_zhe4_li3 远不远:yuan3_bu5_yuan3
零:ling2 一:yi1 二:er4 三:san1 四:si4 五:wu3 六:liu4 七:qi1 八:ba1 九:jiu3 十:shi2 百:bai3
"""
# 一 changes its tone before these measure words.
_TONE_CHANGES = (("yi1 bai3", "yi4 bai3"), ("yi1 zhang1", "yi4 zhang1"))

_DIGITS = tuple("零一二三四五六七八九")
_CITIES = _words("北京 上海 广州 深圳 杭州 南京 成都 武汉 西安 重庆 天津 苏州")
_PLACES = _words("医院 学校 银行 公园 车站 机场 图书馆")
_DAYS = ("今天", "明天", "后天")
_DAY_PARTS = ("早上", "上午", "中午", "下午", "晚上")
_ROOMS = ("客厅", "卧室", "厨房", "书房", "阳台", "浴室")
_DEVICES = ("灯", "空调", "电视", "窗帘", "风扇", "音箱", "热水器")
_PEOPLE = ("妈妈", "爸爸", "老师", "小王", "老李", "医生", "奶奶")

_EN_UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_EN_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_EN_ROOMS = ("kitchen", "bedroom", "bathroom", "garden", "office")
_EN_DEVICES = ("light", "fan", "heater", "radio", "television")
_EN_DAYS = ("today", "tomorrow", "tonight", "on Monday", "on Friday", "on Sunday")
_EN_CITIES = ("London", "Paris", "Berlin", "Boston", "Chicago", "Tokyo")
_EN_PEOPLE = ("my mother", "my father", "the doctor", "the office", "my sister")


@dataclass(frozen=True)
class Sentence:
    """One sentence, what the synthesizer has to be given, and the units that can be aligned.

    Attributes:
        text: Transcript with capitals and final punctuation.
        language: "zh" or "en".
        pronunciation: Space-separated pinyin syllables or English words, one for each unit.
        units: Characters or words; joined, they are the text without its final punctuation.
    """

    text: str
    language: str
    pronunciation: str
    units: tuple[str, ...]


def normalize(text: str) -> str:
    """Returns the text in lower case without punctuation, apostrophes kept."""
    kept = (c for c in text.lower() if c == "'" or not unicodedata.category(c).startswith("P"))
    return " ".join("".join(kept).split())


def split_of(text: str) -> str:
    """Returns the split that a sentence belongs to: a stable function of its normalized text.

    About 85 % of the sentences are train, 5 % dev, 10 % test, so that no sentence of one split can
    occur in another one, whatever the seed.
    """
    digest = hashlib.sha256(normalize(text).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    return "test" if bucket < 10 else "dev" if bucket < 15 else "train"


def draw_sentence(language: str, split: str, rng: random.Random) -> Sentence:
    """Draws a sentence of a language that belongs to a split."""
    draw = {"zh": _draw_mandarin, "en": _draw_english}[language]
    while True:
        sentence = draw(rng)
        if split_of(sentence.text) == split:
            return sentence


@functools.cache
def _pinyin() -> dict[str, str]:
    pairs = (entry.split(":") for entry in _LEXICON.split())
    return {word: reading.replace("_", " ") for word, reading in pairs}


def _draw_mandarin(rng: random.Random) -> Sentence:
    words, mark = rng.choice(_MANDARIN_TEMPLATES)(rng)
    pronunciation = " ".join(_pinyin()[word] for word in words)
    for before, after in _TONE_CHANGES:
        pronunciation = pronunciation.replace(before, after)
    characters = "".join(words)
    return Sentence(characters + mark, "zh", pronunciation, tuple(characters))


def _draw_english(rng: random.Random) -> Sentence:
    phrase, mark = rng.choice(_ENGLISH_TEMPLATES)(rng)
    phrase = phrase[0].upper() + phrase[1:]
    first, *others = phrase.split(" ")
    return Sentence(phrase + mark, "en", phrase, (first, *(f" {word}" for word in others)))


# Mandarin templates. Each returns the words and the final punctuation mark.


def _below_hundred(n: int) -> list[str]:
    tens, ones = divmod(n, 10)
    words = ([_DIGITS[tens]] if tens > 1 else []) + (["十"] if tens else [])
    return words + ([_DIGITS[ones]] if ones or not tens else [])


def _below_thousand(n: int) -> list[str]:
    hundreds, rest = divmod(n, 100)
    if not hundreds:
        return _below_hundred(rest)
    words = [_DIGITS[hundreds], "百"]
    if not rest:
        return words
    if rest < 10:
        return [*words, "零", _DIGITS[rest]]
    tens, ones = divmod(rest, 10)
    return [*words, _DIGITS[tens], "十"] + ([_DIGITS[ones]] if ones else [])


def _count(n: int) -> list[str]:
    return ["两"] if n == 2 else _below_hundred(n)


def _clock_time(rng: random.Random) -> list[str]:
    hour = [*_count(rng.randint(1, 12)), "点"]
    kind = rng.random()
    if kind < 0.35:
        return hour
    if kind < 0.55:
        return [*hour, "半"]
    if kind < 0.65:
        return [*hour, "一刻"]
    return [*hour, *_below_hundred(rng.randint(10, 59)), "分"]


def _opening(rng: random.Random) -> list[str]:
    return rng.choice(([], [], ["请"], ["帮我"], ["麻烦你"]))


def _switch(rng: random.Random) -> tuple[list[str], str]:
    verb = rng.choice(("打开", "关闭", "关掉"))
    return [*_opening(rng), verb, rng.choice(_ROOMS), "的", rng.choice(_DEVICES)], "。"


def _temperature(rng: random.Random) -> tuple[list[str], str]:
    device = [rng.choice(_ROOMS), "的", rng.choice(("空调", "热水器"))]
    degrees = _below_hundred(rng.randint(16, 60))
    return [*_opening(rng), "把", *device, "调到", *degrees, "度"], "。"


def _reminder(rng: random.Random) -> tuple[list[str], str]:
    when = [rng.choice(_DAYS), rng.choice(_DAY_PARTS), *_clock_time(rng)]
    what = rng.choice(("起床", "开会", "吃饭", "上班", "上课", "回家"))
    return [*when, rng.choice(("叫我", "提醒我")), what], "。"


def _date(rng: random.Random) -> tuple[list[str], str]:
    words: list[str] = []
    if rng.random() < 0.6:
        words += ["二", "零", rng.choice(("一", "二")), rng.choice(_DIGITS), "年"]
    words += [*_below_hundred(rng.randint(1, 12)), "月", *_below_hundred(rng.randint(1, 31))]
    words.append(rng.choice(("日", "号")))
    if rng.random() < 0.5:
        words += ["星期", rng.choice((*_DIGITS[1:7], "天"))]
    return words, "。"


def _weather(rng: random.Random) -> tuple[list[str], str]:
    outlooks = (
        ["天气", "怎么样"],
        ["会", "下雨", "吗"],
        ["会", "下雪", "吗"],
        ["会", "刮风", "吗"],
        ["多少度"],
        ["冷不冷"],
        ["热不热"],
    )
    return [rng.choice(_CITIES), rng.choice(_DAYS), *rng.choice(outlooks)], "？"


def _message(rng: random.Random) -> tuple[list[str], str]:
    verb = rng.choice(("打电话", "发短信", "发邮件"))
    return [*_opening(rng), "给", rng.choice(_PEOPLE), verb], "。"


def _tickets(rng: random.Random) -> tuple[list[str], str]:
    start, goal = rng.sample(_CITIES, 2)
    ticket = rng.choice(("火车票", "机票"))
    if rng.random() < 0.5:
        return ["从", start, "到", goal, "的", ticket, "多少钱"], "？"
    wish, verb = rng.choice(("我要", "我想")), rng.choice(("买", "订"))
    return [wish, verb, *_count(rng.randint(1, 9)), "张", "到", goal, "的", ticket], "。"


def _play(rng: random.Random) -> tuple[list[str], str]:
    number = _below_hundred(rng.randint(1, 99))
    pieces = (
        ["音乐"],
        ["新闻"],
        ["故事"],
        ["第", *number, "首", "歌"],
        ["第", *number, "个", "故事"],
    )
    return [*_opening(rng), "播放", *rng.choice(pieces)], "。"


def _phone_number(rng: random.Random) -> tuple[list[str], str]:
    digits = [rng.choice(_DIGITS) for _ in range(rng.randint(3, 7))]
    return ["我的", "电话号码", "是", "一", *digits], "。"


def _price(rng: random.Random) -> tuple[list[str], str]:
    return ["一共", *_below_thousand(rng.randint(11, 999)), "块"], "。"


def _address(rng: random.Random) -> tuple[list[str], str]:
    room = [rng.choice(_DIGITS[1:]), rng.choice(_DIGITS), rng.choice(_DIGITS[1:])]
    return ["我", "住在", *_below_hundred(rng.randint(2, 39)), "楼", *room, "房间"], "。"


def _question(rng: random.Random) -> tuple[list[str], str]:
    city, place = rng.choice(_CITIES), rng.choice(_PLACES)
    questions = (
        [city, "现在", "几点", "了"],
        ["去", place, "怎么走"],
        ["去", city, place, "怎么走"],
        [place, "离这里", "远不远"],
        [city, place, "离这里", "远不远"],
    )
    return rng.choice(questions), "？"


def _outing(rng: random.Random) -> tuple[list[str], str]:
    when = [rng.choice(_DAYS), rng.choice(_DAY_PARTS)]
    return [rng.choice(("我要", "我想")), *when, "去", rng.choice(_CITIES + _PLACES)], "。"


# English templates. Each returns the phrase and the final punctuation mark.


def _en_number(n: int) -> str:
    if n < 20:
        return _EN_UNITS[n]
    tens, ones = divmod(n, 10)
    return _EN_TENS[tens - 2] + (f" {_EN_UNITS[ones]}" if ones else "")


def _en_time(rng: random.Random) -> str:
    minutes = rng.choice(("o'clock", "thirty", "fifteen", _en_number(rng.randint(20, 59))))
    return f"{_EN_UNITS[rng.randint(1, 12)]} {minutes}"


def _en_opening(rng: random.Random) -> str:
    return rng.choice(("", "", "please "))


def _en_switch(rng: random.Random) -> tuple[str, str]:
    verb = rng.choice(("turn on", "turn off"))
    return f"{_en_opening(rng)}{verb} the {rng.choice(_EN_ROOMS)} {rng.choice(_EN_DEVICES)}", "."


def _en_alarm(rng: random.Random) -> tuple[str, str]:
    return f"{_en_opening(rng)}set {rng.choice(('an alarm', 'a timer'))} for {_en_time(rng)}", "."


def _en_weather(rng: random.Random) -> tuple[str, str]:
    return f"what is the weather in {rng.choice(_EN_CITIES)} {rng.choice(_EN_DAYS)}", "?"


def _en_call(rng: random.Random) -> tuple[str, str]:
    return f"{_en_opening(rng)}call {rng.choice(_EN_PEOPLE)} {rng.choice(_EN_DAYS)}", "."


def _en_play(rng: random.Random) -> tuple[str, str]:
    number = _en_number(rng.randint(1, 99))
    piece = rng.choice(("some music", "the news", f"song number {number}"))
    place = rng.choice(("", f" in the {rng.choice(_EN_ROOMS)}"))
    return f"{_en_opening(rng)}play {piece}{place}", "."


def _en_booking(rng: random.Random) -> tuple[str, str]:
    what = rng.choice(("train to", "flight to", "hotel in"))
    city, day = rng.choice(_EN_CITIES), rng.choice(_EN_DAYS)
    return f"{_en_opening(rng)}book a {what} {city} {day}", "."


def _en_phone_number(rng: random.Random) -> tuple[str, str]:
    digits = (rng.choice(_EN_UNITS[:10]) for _ in range(rng.randint(3, 6)))
    return f"my number is {' '.join(digits)}", "."


def _en_temperature(rng: random.Random) -> tuple[str, str]:
    device = f"{rng.choice(_EN_ROOMS)} {rng.choice(('heater', 'fan'))}"
    return f"{_en_opening(rng)}set the {device} to {_en_number(rng.randint(10, 40))}", "."


def _en_reminder(rng: random.Random) -> tuple[str, str]:
    return f"{_en_opening(rng)}remind me at {_en_time(rng)} {rng.choice(_EN_DAYS)}", "."


_MANDARIN_TEMPLATES = (
    _switch,
    _temperature,
    _reminder,
    _date,
    _weather,
    _message,
    _tickets,
    _play,
    _phone_number,
    _price,
    _address,
    _question,
    _outing,
)
_ENGLISH_TEMPLATES = (
    _en_switch,
    _en_alarm,
    _en_weather,
    _en_call,
    _en_play,
    _en_booking,
    _en_phone_number,
    _en_temperature,
    _en_reminder,
)
