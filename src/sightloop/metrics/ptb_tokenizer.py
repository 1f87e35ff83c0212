"""Penn Treebank tokenizer of the COCO caption metrics: Stanford's English tokenizer (CoreNLP 3.4.1, 2014) in Python.

The tokenizer is a list of regular expressions (`_RULES`). At every position all of them are tried; the longest match
wins, and of equally long ones the first rule. Group 1 of a rule is the token, what it matches behind group 1 is
look-ahead that stays for the next token:

    "dogs' toys"   rule ({WORD}){CLITIC} does not match, ({WORD}) matches "dogs": the token is "dogs"
    "dog's toys"   rule ({WORD}){CLITIC} matches "dog's" (5 characters), ({WORD}) only "dog": the token is "dog", and
                   the next position starts at "'s"

The rules run on a copy of the text, its shape, in which one character represents a whole class beyond ASCII (`_SHAPE`):
"é" for letters, U+0300 for combining marks, U+0660 for digits. "Zürich ٣" has the shape "Zérich \u0660"; the token is
cut from the text at the same position.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeAlias

# What COCO removes. Brackets stay: its list has them in upper case, while its tokens are in lower case.
_PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

_Rewrite: TypeAlias = Callable[[str], str]  # a token as it is in the text -> as the treebank writes it


def ptb_tokenize(captions: Iterable[str]) -> list[str]:
    """Captions as COCO scores them: PTB tokens in lower case without punctuation, joined by single spaces.

    `ptb_tokenize(["A dog can't sit."])` is ["a dog ca n't sit"].

    The same as `PTBTokenizer` of the official code on each caption alone. There, a caption with a line break other than
    \\n shifts all captions behind it, and a few abbreviations at the end of a caption look into the next caption; here
    neither happens.
    """
    return [
        " ".join(token for token in ptb_tokens(caption) if token not in _PUNCTUATION) for caption in captions
    ]


def ptb_tokens(text: str) -> list[str]:
    """All tokens in lower case, punctuation included: "A dog can't." -> ["a", "dog", "ca", "n't", "."].

    Spaces within a token (as in "1 1/2") are no-break spaces. Characters that no rule matches (emoji) are dropped.
    """
    # Fast path: letters, spaces and commas, perhaps a full stop at the end. It does not hold where a word is split
    # ("cannot") or keeps the full stop ("Mr.").
    if simple := _SIMPLE.fullmatch(text):
        words = simple[1].lower().replace(",", " , ").split()
        keeps_stop = bool(simple[2] and words) and words[-1] in _STOPPED and not simple[1].endswith(" ")
        if not keeps_stop and _SPLIT.isdisjoint(words):
            return [*words, "."] if simple[2] else words
    text += "\n"
    shape = text.translate(_SHAPE)
    tokens: list[str] = []
    position = 0
    while position < len(text):
        # The same for a single word: letters before a space, a comma or a full stop.
        word = _WORD.match(shape, position)
        if word and word[1].lower() not in (_STOPPED if word[2] else _SPLIT):
            token, position = word[1], word.end()
        else:
            token, position = _next_token(text, shape, position)
        if token:
            tokens.append(token.lower())
    return tokens


def _next_token(text: str, shape: str, position: int) -> tuple[str, int]:
    """The token at a position ("" for a dropped character), and the position behind it."""
    longest: re.Match[str] | None = None
    longest_rewrite: _Rewrite = str
    for pattern, rewrite in _compiled_rules():
        match = pattern.match(shape, position)
        if match and (longest is None or match.end() > longest.end()):
            longest, longest_rewrite = match, rewrite
    if longest is None:
        return "", position + 1
    return longest_rewrite(text[position : longest.end(1)]), longest.end(1)


class _Shape(dict[int, int]):
    """Table for `str.translate`: code point -> code point of its class, filled on first use."""

    def __missing__(self, code: int) -> int:
        category = unicodedata.category(chr(code))
        if code < 0x80 or code > 0xFFFF:
            shape = code
        elif category[0] == "L":
            shape = ord("é")
        elif (category in ("Mn", "Mc") and code < 0xE50) or 0x2C2 <= code < 0x370 or code == 0xAD:
            shape = ord("\u0300")
        else:
            shape = ord("\u0660") if category == "Nd" else code
        self[code] = shape
        return shape


_SHAPE = _Shape()

_SIMPLE = re.compile(r"([A-Za-z ,]*)([.]?) *")
_WORD = re.compile(r" *([A-Za-z]+)(?=(?:,|([.]))?\s)")
# Words that are two tokens, "cannot" -> "can", "not": the first in the key, the second in the value.
_ASSIMILATED = {"can": "not", "gon": "na", "got": "ta", "wan": "na", "lem": "me", "gim": "me"}

# Abbreviations that keep their full stop, "etc." -> "etc.": anywhere ...
_ABBREVIATIONS = """
    [a-z] al cf co ct dr ft ga jr ky lt md mo mr ms mt ph rd rt sq sr st va vs vt wm
    adj adm adv ala apr aug ave bhd cie col cos cpl dak dec det drs ens esq est etc ext feb fla fri gen gov hon inc
    ind jan jos jul jun kan ltd maj mar mfg mme mon mrs mtg neb nev nov oct pfc plc pte pty pvt rep rev sen sep seq
    sfc sgt spc ste sys tel thu tue wed wis wyo
    alex ariz assn asst atty bldg blvd brig bros capt cmdr colo conn corp dept elec govs insp intl invt kans mich
    minn mlle mont msgr natl okla penn ppte ppty pres prof ptes ptys reps sens sept supt tenn tues univ wisc
    attys calif comdr lieut pptes pptys profs supts thurs treas messrs bancorp ed[.]d ph[.]d a[.]k[.]a
""".split()
# ... written with a capital, "Mass." (without it they are common words) ...
_CAPITAL_ABBREVIATIONS = "Az La Pa Ark Del Ill Ore Tex Mass Miss Wash".split()
# ... and before a number, "No. 5".
_NUMBERED_ABBREVIATIONS = "ca no op pp art fig nos figs prop".split()
# Endings of file names, "cat.jpg".
_FILES = """
    bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip
""".split()
_SPLIT = frozenset(first + rest for first, rest in _ASSIMILATED.items())
_STOPPED = frozenset("abcdefghijklmnopqrstuvwxyz").union(
    _SPLIT, _ABBREVIATIONS, map(str.lower, _CAPITAL_ABBREVIATIONS), _NUMBERED_ABBREVIATIONS
)
# A single letter keeps its full stop ("C. Smith"), but not before a word that starts a sentence ("Vitamin C. The").
_OPENERS = """
    About According Additionally After A An As At But Earlier He Her Here However If In It Last Many More Mr[.] Ms[.]
    Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You
""".split()


def _join_spaces(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _write_brackets(token: str) -> str:
    return token.replace("(", "-LRB-").replace(")", "-RRB-").replace(" ", "\u00a0")


def _drop_soft_hyphens(token: str) -> str:
    """Without soft hyphens, which only mark where a line may break."""
    return token.replace("\u00ad", "") or "-"


def _write_quotes(token: str) -> str:
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


def _write_fraction(token: str) -> str:
    return _FRACTIONS.get(token, token)


def _write_currency(token: str) -> str:
    return _CURRENCIES.get(token, token)


def _write_ampersand(token: str) -> str:
    return _ENTITY_AMP.sub("&", token)


def _always(text: str) -> _Rewrite:
    return lambda token: text


def _capitalized(word: str) -> str:
    """Pattern of a word whose first letter has the given case, the others any."""
    return f"{word[0]}(?i:{word[1:]})"


def _one_of(texts: Iterable[str]) -> str:
    return f"(?:{'|'.join(sorted(texts, key=len, reverse=True))})"


# Characters that are tokens where no other rule matches; all other characters beyond ASCII are dropped.
_SYMBOLS = (
    "!#%&*-/:-@\\\\^|~=+\u00a1\u00a6-\u00a9\u00ac\u00ae-\u00b8\u00ba\u00bf\u00d7\u00f7"
    "\u037e\u0387\u0589\u060c\u061b\u061f\u066a\u06d4\u0964\u0965\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042"
    "\u2044\u207a-\u207e\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    "\uff01-\uff20\uff3b-\uff40\uff5b-\uff65"
)
# Character classes and parts of tokens, for use in rules as {LETTER}; a part may use those before it. On the shape of a
# text, é is any letter, U+0300 any combining mark and U+0660 any digit beyond ASCII.
_PARTS = [
    ("LETTER", "[A-Za-zé]"),
    ("ALNUM", "[A-Za-zé0-9\u0660]"),
    ("DIGIT", "[0-9\u0660]"),
    # An accent may be a separate character or an HTML entity: "cafe\u0301", "caf&eacute;".
    ("LETTERLIKE", "[A-Za-zé\u0300]|(?i:&[aeiou](?:acute|grave|uml);)"),
    ("WORDCHAR", "{LETTERLIKE}|{DIGIT}"),
    ("APOS", "['\u0092\u2019]|&apos;"),
    ("TICK", "['\u0092\u2019`\u0091\u2018\u201b]|&apos;"),
    ("SPACE", "[ \\t\u00a0\u2000-\u200a\u3000]"),
    ("AMP", "&(?i:amp;)?"),
    ("WORD", "{LETTERLIKE}{WORDCHAR}*(?:[.!?]{LETTERLIKE}{WORDCHAR}*)*"),
    ("CLITIC", "{APOS}(?i:[msd]|re|ve|ll)"),
    ("NT", "[nN]{TICK}[tT]"),
    ("PIECE", "(?:[dDoOlL]{TICK}{ALNUM})?{ALNUM}+"),
    ("COMPOUND", "{PIECE}(?:[-_\u058a\u2010\u2011]{PIECE})*"),
    ("US", "(?i:(?:canada|sino|korean|eu|japan|non)-u[.]s|u[.]s[.]-u[.](?:k|s[.]s[.]r))"),
    ("DOTTED", "[A-Za-z](?:[.][A-Za-z])+|{US}"),
    ("HYPHENATED", "[A-Za-z0-9][A-Za-z0-9.,\u0300]*(?:-(?:{DOTTED}[.]|[A-Za-z0-9\u0300]+))+"),
    ("SIDE", "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"),
    ("INITIALS", "[A-Z]+(?:(?:[+]|{AMP})[A-Z]+)+"),
    ("ABBREVIATION", f"(?i:{_one_of(_ABBREVIATIONS)})|{_one_of(map(_capitalized, _CAPITAL_ABBREVIATIONS))}"),
    ("NUMBERED", f"(?i:{_one_of(_NUMBERED_ABBREVIATIONS)})"),
    ("OPENER", _one_of(map(_capitalized, _OPENERS))),
    ("FILE", _one_of(_FILES)),
    ("URLCHAR", '[^\\s"<>|(){}]'),
    ("LABEL", '[^\\s"<>|(){}.]+'),
    ("TAGNAME", "[A-Za-z][A-Za-z0-9_:.-]*"),
    ("EYE", "[-^x=~<>']"),
]

# Each rule under an example of its token (and of the next one).
_RULES: list[tuple[str, _Rewrite]] = [
    # cannot -> can, not; gonna -> gon, na
    *((f"((?i:{first}))(?i:{rest})", str) for first, rest in _ASSIMILATED.items()),
    # 'twas -> 't, was
    ("((?i:'t))(?i:was|is)", str),
    # C++, c#, F#
    ("([cC][+][+]|[cCfF]#)", str),
    # ----- Words before a clitic, words, words with an apostrophe.
    # dog's -> dog (and 's)
    ("({WORD}){CLITIC}", _drop_soft_hyphens),
    # can't -> ca (and n't); don't -> do (and n't)
    ("([A-Za-z\u0300]*[A-MO-Za-mo-z]\u0300*){NT}", _drop_soft_hyphens),
    # dog; Zürich; U.S (of U.S.A); a soft hyphen is dropped
    ("({WORD})", _drop_soft_hyphens),
    # rock 'n' roll; l'; dunkin'; ol'
    ("({APOS}[nN]{APOS}?|(?i:[ldj]|dunkin|somethin|ol){APOS})", str),
    # 'em; 'til; '90s
    ("({APOS}(?i:em|till?|cause)|{APOS}[2-9]0[sS])", str),
    # O'Brien; D'Angelo; o'o
    (
        "([A-HJ-XZn]{TICK}{LETTER}{LETTER}+|{LETTER}+[aeiouyAEIOUY]{TICK}[aeiouA-Z]{LETTER}*|[oO]{TICK}[oO])",
        str,
    ),
    # nor'easter; c'mon; li'l
    ("((?i:cont'd[.]?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cap{APOS}n|c{APOS}est))", str),
    # Y'all -> Y' (and all)
    ("([yY]{APOS}){LETTER}", str),
    # 's; n't
    ("({CLITIC}|{NT})[^A-Za-z]", _write_quotes),
    # ----- Addresses, tags.
    # https://a.com/b. -> https://a.com/b (and .)
    ("((?i:https?)://{URLCHAR}+(?<![-.!?,]))", str),
    # www.cat.com
    ("((?i:www[.]){URLCHAR}+[.][a-zA-Z]{2,4}(?:/{URLCHAR}+(?<![-.!?,]))?)", str),
    # cat.com/x
    ("((?:[^\\s\"`'<>|!?(){},-_$]+[.])+(?i:com|net|org|edu)(?:/{URLCHAR}+(?<![-.!?,]))?)", str),
    # a@b.org; <a@b.org>
    ("((?:<|&lt;)?[A-Za-z0-9]{URLCHAR}*@(?:{LABEL}[.])*{LABEL}>?)", str),
    # @user; #tag
    ("(@[A-Za-z_][A-Za-z_0-9]*|#{LETTERLIKE}+)", str),
    # <br>; <img src='x'> -> <img\u00a0src='x'>
    (
        "(<(?:[!?][A-Za-z-][^>]*|/?{TAGNAME}(?: +{TAGNAME}(?: *= *(?:'[^']*'|\"[^\"]*\"))?)*) */?>)",
        _join_spaces,
    ),
    # ----- Numbers.
    # 1/2/2020
    ("({DIGIT}{1,2}[-/]{DIGIT}{1,2}[-/]{DIGIT}{2,4})", str),
    # 3.5; -2; 10:30; 1,000
    ("([-+]?(?:{DIGIT}*(?:[.:,\u066b\u066c\u0300]{DIGIT}+)+|{DIGIT}+))", _drop_soft_hyphens),
    # the ² of x²
    ("([\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+))", str),
    # 1/2; 1 1/2 -> 1\u00a01/2
    ("((?:{DIGIT}{1,4}[- \u00a0])?{DIGIT}{1,4}(?:\\\\?/|\u2044){DIGIT}{1,4})", _join_spaces),
    # ½ -> 1/2
    ("([\u00bc-\u00be\u2153-\u215e])", _write_fraction),
    # and/or; his/her
    ("({SIDE}(?:\\\\?/{SIDE}){1,2})", str),
    # $; US$
    ("([A-Z]*[$]|#)", str),
    # ¢ -> cents; £ -> #; € -> $
    ("([\u00a2-\u00a5\u0080\u20a0\u20a4\u20ac\u060b\u0e3f\uffe0\uffe1\uffe5\uffe6])", _write_currency),
    # (555) 123-4567 -> -LRB-555-RRB-\u00a0123-4567
    ("([(][0-9]{2,3}[)][ \u00a0]?[0-9]{3,4}[- \u00a0]?[0-9]{3,5})", _write_brackets),
    # +44 20 7946 0958
    ("([+]{0,2}(?:[0-9]{2,4}[- \u00a0]){1,2}[0-9]{3,4}[- \u00a0]?[0-9]{3,5})", _join_spaces),
    # 555.123.4567
    ("((?:[+]{0,2}[0-9]{2,4}[.])?[0-9]{2,4}[.][0-9]{3,4}[.][0-9]{3,5})", str),
    # ----- Abbreviations.
    # vitamin C. The dog -> C (and .), where The starts a sentence
    ("([A-Za-z])[.]\\s+{OPENER}\\s", str),
    # No. 5 -> No.
    ("({NUMBERED}[.]){SPACE}?{DIGIT}", str),
    # e.g.; Ph.D.; Mr.; etc.
    ("((?:{DOTTED}|{ABBREVIATION})[.])", str),
    # Non-U.S; U.S.-U.K
    ("({US})\\s", str),
    # '90
    ("({APOS}[0-9][0-9])\\s", str),
    # cat.jpg
    ("((?:{WORDCHAR}+[.])+(?i:{FILE}))[\\s.?!,]", str),
    # dog., -> dog. (and ,)
    ("({WORD}[.])[,;:\u3001]", _drop_soft_hyphens),
    # ----- Compounds.
    # well-known., -> well-known. (and ,)
    ("({HYPHENATED}[.])[,;:\u3001]", _drop_soft_hyphens),
    # well-known; X-ray; U.S.-based
    ("({HYPHENATED})", _drop_soft_hyphens),
    # 3d., -> 3d. (and ,)
    ("({COMPOUND}[.])[,;:\u3001]", str),
    # 3d; l'amour; tic_tac
    ("({COMPOUND})", str),
    # AT&T., -> AT&T. (and ,)
    ("({INITIALS}[.])[,;:\u3001]", _write_ampersand),
    # AT&T; AT&amp;T -> AT&T
    ("({INITIALS})", _write_ampersand),
    # -LRB- as it is; pro-; S&P-500
    ("(-(?:[RL][RCS]B)-|(?i:c[.]d[.]s|pro-|anti-|s{AMP}p-500|s{AMP}ls))", _write_ampersand),
    # ----- Quotes, brackets, dashes, dots.
    # " before a word -> ``
    ('((?i:"|&quot;))[A-Za-z0-9$]', _always("``")),
    # any other " -> ''
    ('((?i:"|&quot;))', _always("''")),
    # 'dog -> ` (and dog)
    ("(')[A-Za-z][^ \\t\\n\\r\u00a0]", _always("`")),
    # ’sa -> 's (and a)
    ("({CLITIC}|{NT})", _write_quotes),
    # ‘ -> `; ’ -> '; “ -> ``; ” -> ''
    ("(''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}|{APOS})", _write_quotes),
    # &lt; -> <
    ("((?i:&lt;))", _always("<")),
    # &gt; -> >
    ("((?i:&gt;))", _always(">")),
    # :-) -> :--RRB-
    ("([<>]?[:;=][-o*']?[()DPdpO\\\\{@|\\[\\]])[^A-Za-z0-9]", _write_brackets),
    # ^_^; (-_-) -> -LRB--_--RRB-
    ("({EYE}_{EYE}|[(]{EYE}[-_.]?{EYE}[)])", _write_brackets),
    # ( -> -LRB-; ) -> -RRB-
    ("([()])", _write_brackets),
    # { -> -LCB-
    ("([{])", _always("-LCB-")),
    # } -> -RCB-
    ("([}])", _always("-RCB-")),
    # [ -> -LSB-
    ("(\\[)", _always("-LSB-")),
    # ] -> -RSB-
    ("(\\])", _always("-RSB-")),
    # &mdash;; —; --- -> --
    ("((?i:&(?:md|mdash|ndash);)|[\u0096\u0097\u2013-\u2015]|-{3,4}(?!-))", _always("--")),
    # -; --; -----
    ("(-+)", str),
    # ...; . . .; … -> ...
    ("([.]{3,5}|(?:[.][ \u00a0]){2,4}[.]|\u2026)", _always("...")),
    # &amp; -> &
    ("((?i:&amp;))", _always("&")),
    # &#33;
    ("(&#[0-9]+;)", str),
    # !!; ?!; **; @@; <<
    ("(@+|#+|_+|[*]+|[?!]+|<<|>>|(?:\\\\[*]){1,3})", str),
    # any other symbol: %; +; °; ™
    (f"([{_SYMBOLS}])", str),
    # &nbsp; is dropped
    ("((?i:&nbsp;))", _always("")),
]


@cache
def _compiled_rules() -> list[tuple[re.Pattern[str], _Rewrite]]:
    """`_RULES` with their parts filled in, compiled, in the same order."""
    parts: dict[str, str] = {}

    def fill(pattern: str) -> str:
        return re.sub("{([A-Z]+)}", lambda name: f"(?:{parts[name[1]]})", pattern)

    for name, pattern in _PARTS:
        parts[name] = fill(pattern)
    return [(re.compile(fill(pattern)), rewrite) for pattern, rewrite in _RULES]
