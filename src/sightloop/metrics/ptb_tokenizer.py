"""The Penn Treebank tokens of COCO's caption scores: those of Stanford's English tokenizer of 2014, without Java.

It is a list of rules; at every place the rule that sees farthest wins, and of equals the first. What a rule sees
beyond its token (group 1) stays for the next one. The rules speak of kinds of characters, so they run on a copy of the
text in which one character stands for all letters beyond ASCII, one for all marks and one for all digits (`_KINDS`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeAlias

# What COCO removes. Brackets stay: its list has them in upper case, while its tokens are in lower case.
_PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

_Rewrite: TypeAlias = Callable[[str], str]


def tokenize(captions: Iterable[str]) -> list[str]:
    """Every caption as COCO scores it: tokens in lower case without punctuation, joined by single spaces.

    The same as the official code's `PTBTokenizer` (Stanford CoreNLP 3.4.1) on each caption alone. There, a caption
    that holds a line break of another kind than \\n shifts all captions behind it, and a few abbreviations at a
    caption's end look into the next one; here neither happens.
    """
    return [" ".join(token for token in tokens(caption) if token not in _PUNCTUATION) for caption in captions]


def tokens(text: str) -> list[str]:
    """All tokens in lower case, punctuation included: `"A dog can't."` -> ["a", "dog", "ca", "n't", "."].

    Spaces within a token (as in "1 1/2") are no-break spaces. Characters that no rule knows (emoji) are left out.
    """
    if simple := _SIMPLE.fullmatch(text):
        found = simple[1].lower().replace(",", " , ").split()
        stopped = bool(simple[2] and found) and found[-1] in _STOPPED and not simple[1].endswith(" ")
        if not stopped and _SPLIT.isdisjoint(found):
            return [*found, "."] if simple[2] else found
    text += "\n"
    shape = text.translate(_KINDS)
    found: list[str] = []
    at = 0
    while at < len(text):
        word = _WORD.match(shape, at)
        if word and word[1].lower() not in (_STOPPED if word[2] else _SPLIT):
            token, at = word[1], word.end()
        else:
            token, at = _next(text, shape, at)
        if token:
            found.append(token.lower())
    return found


def _next(text: str, shape: str, at: int) -> tuple[str, int]:
    """The token at a place ("" for what is left out), and the place behind it."""
    best: re.Match[str] | None = None
    rewrite: _Rewrite = str
    for pattern, change in _rules():
        match = pattern.match(shape, at)
        if match and (best is None or match.end() > best.end()):
            best, rewrite = match, change
    if best is None:
        return "", at + 1
    return rewrite(text[at : best.end(1)]), best.end(1)


class _Kinds(dict[int, int]):
    """Character -> the one that stands for its kind, found out when first met."""

    def __missing__(self, code: int) -> int:
        kind = unicodedata.category(chr(code))
        if code < 0x80 or code > 0xFFFF:
            stands = code
        elif kind[0] == "L":
            stands = ord("é")
        elif (kind in ("Mn", "Mc") and code < 0xE50) or 0x2C2 <= code < 0x370 or code == 0xAD:
            stands = ord("\u0300")
        else:
            stands = ord("\u0660") if kind == "Nd" else code
        self[code] = stands
        return stands


_KINDS = _Kinds()

# Short cuts: a caption of words and commas with perhaps a full stop; a word, perhaps before a comma or full stop.
_SIMPLE = re.compile(r"([A-Za-z ,]*)([.]?) *")
_WORD = re.compile(r" *([A-Za-z]+)(?=(?:,|([.]))?\s)")
# Words that are two tokens: the first letters of each stand in the key, the rest in the value.
_ASSIMILATED = {"can": "not", "gon": "na", "got": "ta", "wan": "na", "lem": "me", "gim": "me"}

# Abbreviations that keep their full stop: anywhere ...
_ABBREVIATIONS = """
    [a-z] al cf co ct dr ft ga jr ky lt md mo mr ms mt ph rd rt sq sr st va vs vt wm
    adj adm adv ala apr aug ave bhd cie col cos cpl dak dec det drs ens esq est etc ext feb fla fri gen gov hon inc
    ind jan jos jul jun kan ltd maj mar mfg mme mon mrs mtg neb nev nov oct pfc plc pte pty pvt rep rev sen sep seq
    sfc sgt spc ste sys tel thu tue wed wis wyo
    alex ariz assn asst atty bldg blvd brig bros capt cmdr colo conn corp dept elec govs insp intl invt kans mich
    minn mlle mont msgr natl okla penn ppte ppty pres prof ptes ptys reps sens sept supt tenn tues univ wisc
    attys calif comdr lieut pptes pptys profs supts thurs treas messrs bancorp ed[.]d ph[.]d a[.]k[.]a
""".split()
# ... with a capital (or these would be common words) ...
_CAPITAL_ABBREVIATIONS = "Az La Pa Ark Del Ill Ore Tex Mass Miss Wash".split()
# ... and before a number.
_NUMBERED_ABBREVIATIONS = "ca no op pp art fig nos figs prop".split()
_FILES = """
    bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip
""".split()
_SPLIT = frozenset(first + rest for first, rest in _ASSIMILATED.items())
_STOPPED = frozenset("abcdefghijklmnopqrstuvwxyz").union(
    _SPLIT, _ABBREVIATIONS, map(str.lower, _CAPITAL_ABBREVIATIONS), _NUMBERED_ABBREVIATIONS
)
# "I. The ...": a capital letter with a full stop ends a sentence if one of these comes behind it.
_OPENERS = """
    About According Additionally After A An As At But Earlier He Her Here However If In It Last Many More Mr[.] Ms[.]
    Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You
""".split()


def _spaceless(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _bracketed(token: str) -> str:
    return token.replace("(", "-LRB-").replace(")", "-RRB-").replace(" ", "\u00a0")


def _unhyphened(token: str) -> str:
    """Without soft hyphens, which only say where a line may break."""
    return token.replace("\u00ad", "") or "-"


def _quoted(token: str) -> str:
    """Quotes as the treebank writes them: `` and '', ` and '."""
    token = token.replace("&apos;", "'").replace("&quot;", '"').replace('"', "''")
    return token.translate(_QUOTES)


_QUOTES = str.maketrans(
    dict.fromkeys("\u0091\u2018\u201b\u2039", "`")
    | dict.fromkeys("\u0092\u2019\u203a", "'")
    | dict.fromkeys("\u0093\u201c\u00ab", "``")
    | dict.fromkeys("\u0094\u201d\u00bb", "''")
)
_CURRENCIES = {"¢": "cents", "£": "#"} | dict.fromkeys("\u0080¤₠€", "$")
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_ENTITY_AMP = re.compile("&amp;", re.IGNORECASE)


def _fraction(token: str) -> str:
    return _FRACTIONS.get(token, token)


def _currency(token: str) -> str:
    return _CURRENCIES.get(token, token)


def _ampersand(token: str) -> str:
    return _ENTITY_AMP.sub("&", token)


def _fixed(text: str) -> _Rewrite:
    return lambda token: text


def _capital(word: str) -> str:
    """Matches the word in any case but for its capital."""
    return f"{word[0]}(?i:{word[1:]})"


def _one_of(texts: Iterable[str]) -> str:
    return f"(?:{'|'.join(sorted(texts, key=len, reverse=True))})"


# Characters that are tokens wherever nothing else takes them; all others beyond ASCII are left out.
_SYMBOLS = (
    "!#%&*-/:-@\\\\^|~=+\u00a1\u00a6-\u00a9\u00ac\u00ae-\u00b8\u00ba\u00bf\u00d7\u00f7"
    "\u037e\u0387\u0589\u060c\u061b\u061f\u066a\u06d4\u0964\u0965\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042"
    "\u2044\u207a-\u207e\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    "\uff01-\uff20\uff3b-\uff40\uff5b-\uff65"
)
# Kinds of characters and parts of tokens, by which the rules are written.
_PARTS = [
    ("A", "[A-Za-zé]"),
    ("C", "[A-Za-zé0-9\u0660]"),
    ("D", "[0-9\u0660]"),
    # What words are made of: letters, and marks, since an accent may be a character of its own.
    ("M", "[A-Za-zé\u0300]|(?i:&[aeiou](?:acute|grave|uml);)"),
    ("X", "{M}|{D}"),
    ("APOS", "['\u0092\u2019]|&apos;"),
    ("TICK", "['\u0092\u2019`\u0091\u2018\u201b]|&apos;"),
    ("SPACE", "[ \\t\u00a0\u2000-\u200a\u3000]"),
    ("AMP", "&(?i:amp;)?"),
    ("WORD", "{M}{X}*(?:[.!?]{M}{X}*)*"),
    ("CLITIC", "{APOS}(?i:[msd]|re|ve|ll)"),
    ("NOT", "[nN]{TICK}[tT]"),
    ("PIECE", "(?:[dDoOlL]{TICK}{C})?{C}+"),
    ("COMPOUND", "{PIECE}(?:[-_\u058a\u2010\u2011]{PIECE})*"),
    ("US", "(?i:(?:canada|sino|korean|eu|japan|non)-u[.]s|u[.]s[.]-u[.](?:k|s[.]s[.]r))"),
    ("DOTTED", "[A-Za-z](?:[.][A-Za-z])+|{US}"),
    ("HYPHENED", "[A-Za-z0-9][A-Za-z0-9.,\u0300]*(?:-(?:{DOTTED}[.]|[A-Za-z0-9\u0300]+))+"),
    ("SIDE", "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"),
    ("TEAM", "[A-Z]+(?:(?:[+]|{AMP})[A-Z]+)+"),
    ("STOPPED", f"(?i:{_one_of(_ABBREVIATIONS)})|{_one_of(map(_capital, _CAPITAL_ABBREVIATIONS))}"),
    ("NUMBERED", f"(?i:{_one_of(_NUMBERED_ABBREVIATIONS)})"),
    ("OPENER", _one_of(map(_capital, _OPENERS))),
    ("FILE", _one_of(_FILES)),
    ("URL", '[^\\s"<>|(){}]'),
    ("LABEL", '[^\\s"<>|(){}.]+'),
    ("NAME", "[A-Za-z][A-Za-z0-9_:.-]*"),
    ("EYE", "[-^x=~<>']"),
]

_RULES: list[tuple[str, _Rewrite]] = [
    *((f"((?i:{first}))(?i:{rest})", str) for first, rest in _ASSIMILATED.items()),
    ("((?i:'t))(?i:was|is)", str),
    ("([cC][+][+]|[cCfF]#)", str),
    # Words without what clings to them, words, and words with an apostrophe of their own.
    ("({WORD}){CLITIC}", _unhyphened),
    ("([A-Za-z\u0300]*[A-MO-Za-mo-z]\u0300*){NOT}", _unhyphened),
    ("({WORD})", _unhyphened),
    ("({APOS}[nN]{APOS}?|(?i:[ldj]|dunkin|somethin|ol){APOS})", str),
    ("({APOS}(?i:em|till?|cause)|{APOS}[2-9]0[sS])", str),
    ("([A-HJ-XZn]{TICK}{A}{A}+|{A}+[aeiouyAEIOUY]{TICK}[aeiouA-Z]{A}*|[oO]{TICK}[oO])", str),
    ("((?i:cont'd[.]?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cap{APOS}n|c{APOS}est))", str),
    ("([yY]{APOS}){A}", str),
    ("({CLITIC}|{NOT})[^A-Za-z]", _quoted),
    # Addresses, tags.
    ("((?i:https?)://{URL}+(?<![-.!?,]))", str),
    ("((?i:www[.]){URL}+[.][a-zA-Z]{2,4}(?:/{URL}+(?<![-.!?,]))?)", str),
    ("((?:[^\\s\"`'<>|!?(){},-_$]+[.])+(?i:com|net|org|edu)(?:/{URL}+(?<![-.!?,]))?)", str),
    ("((?:<|&lt;)?[A-Za-z0-9]{URL}*@(?:{LABEL}[.])*{LABEL}>?)", str),
    ("(@[A-Za-z_][A-Za-z_0-9]*|#{M}+)", str),
    ("(<(?:[!?][A-Za-z-][^>]*|/?{NAME}(?: +{NAME}(?: *= *(?:'[^']*'|\"[^\"]*\"))?)*) */?>)", _spaceless),
    # Numbers.
    ("({D}{1,2}[-/]{D}{1,2}[-/]{D}{2,4})", str),
    ("([-+]?(?:{D}*(?:[.:,\u066b\u066c\u0300]{D}+)+|{D}+))", _unhyphened),
    ("([\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+))", str),
    ("((?:{D}{1,4}[- \u00a0])?{D}{1,4}(?:\\\\?/|\u2044){D}{1,4})", _spaceless),
    ("([\u00bc-\u00be\u2153-\u215e])", _fraction),
    ("({SIDE}(?:\\\\?/{SIDE}){1,2})", str),
    ("([A-Z]*[$]|#)", str),
    ("([\u00a2-\u00a5\u0080\u20a0\u20a4\u20ac\u060b\u0e3f\uffe0\uffe1\uffe5\uffe6])", _currency),
    ("([(][0-9]{2,3}[)][ \u00a0]?[0-9]{3,4}[- \u00a0]?[0-9]{3,5})", _bracketed),
    ("([+]{0,2}(?:[0-9]{2,4}[- \u00a0]){1,2}[0-9]{3,4}[- \u00a0]?[0-9]{3,5})", _spaceless),
    ("((?:[+]{0,2}[0-9]{2,4}[.])?[0-9]{2,4}[.][0-9]{3,4}[.][0-9]{3,5})", str),
    # Abbreviations.
    ("([A-Za-z])[.]\\s+{OPENER}\\s", str),
    ("({NUMBERED}[.]){SPACE}?{D}", str),
    ("((?:{DOTTED}|{STOPPED})[.])", str),
    ("({US})\\s", str),
    ("({APOS}[0-9][0-9])\\s", str),
    ("((?:{X}+[.])+(?i:{FILE}))[\\s.?!,]", str),
    ("({WORD}[.])[,;:\u3001]", _unhyphened),
    # Compounds.
    ("({HYPHENED}[.])[,;:\u3001]", _unhyphened),
    ("({HYPHENED})", _unhyphened),
    ("({COMPOUND}[.])[,;:\u3001]", str),
    ("({COMPOUND})", str),
    ("({TEAM}[.])[,;:\u3001]", _ampersand),
    ("({TEAM})", _ampersand),
    ("(-(?:[RL][RCS]B)-|(?i:c[.]d[.]s|pro-|anti-|s{AMP}p-500|s{AMP}ls))", _ampersand),
    # Quotes, brackets, dashes, dots.
    ('((?i:"|&quot;))[A-Za-z0-9$]', _fixed("``")),
    ('((?i:"|&quot;))', _fixed("''")),
    ("(')[A-Za-z][^ \\t\\n\\r\u00a0]", _fixed("`")),
    ("({CLITIC}|{NOT})", _quoted),
    ("(''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}|{APOS})", _quoted),
    ("((?i:&lt;))", _fixed("<")),
    ("((?i:&gt;))", _fixed(">")),
    ("([<>]?[:;=][-o*']?[()DPdpO\\\\{@|\\[\\]])[^A-Za-z0-9]", _bracketed),
    ("({EYE}_{EYE}|[(]{EYE}[-_.]?{EYE}[)])", _bracketed),
    ("([()])", _bracketed),
    ("([{])", _fixed("-LCB-")),
    ("([}])", _fixed("-RCB-")),
    ("(\\[)", _fixed("-LSB-")),
    ("(\\])", _fixed("-RSB-")),
    ("((?i:&(?:md|mdash|ndash);)|[\u0096\u0097\u2013-\u2015]|-{3,4}(?!-))", _fixed("--")),
    ("(-+)", str),
    ("([.]{3,5}|(?:[.][ \u00a0]){2,4}[.]|\u2026)", _fixed("...")),
    ("((?i:&amp;))", _fixed("&")),
    ("(&#[0-9]+;)", str),
    ("(@+|#+|_+|[*]+|[?!]+|<<|>>|(?:\\\\[*]){1,3})", str),
    (f"([{_SYMBOLS}])", str),
    ("((?i:&nbsp;))", _fixed("")),
]


@cache
def _rules() -> list[tuple[re.Pattern[str], _Rewrite]]:
    """(what a rule sees, with its token as group 1; how the token is written), the first of equals first."""
    parts: dict[str, str] = {}

    def fill(pattern: str) -> str:
        return re.sub("{([A-Z]+)}", lambda name: f"(?:{parts[name[1]]})", pattern)

    for name, pattern in _PARTS:
        parts[name] = fill(pattern)
    return [(re.compile(fill(pattern)), rewrite) for pattern, rewrite in _RULES]
