"""The form in which open-ended answers are compared: the normalisation of VQA's evaluation.

Source: VQA (Antol et al., ICCV 2015), whose steps visualqa.org/evaluation.html lists and `vqaEval.py` computes. Where
the two differ, the list is followed: the code judges a comma or a hyphen by the whole answer, not by its place.
"""

import re
import unicodedata

_ARTICLES = frozenset(("a", "an", "the"))
# As far as VQA goes.
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# Without those that are another word once the apostrophe is gone: its, well, were, hell, shell, ill, id, wed, lets.
_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't "
    "shouldn't wasn't weren't won't wouldn't could've might've must've should've would've i'm i've you're you've "
    "you'll we've they're they've they'll they'd he's she's it'll that's that'll there's here's what's where's who's "
    "how's ma'am o'clock y'all"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
# The last is one character in Unicode, which NFKC takes apart into an apostrophe of this kind and a letter.
_APOSTROPHES = str.maketrans({**dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'"), "\u0149": "'n"})


def normalise(answer: str) -> str:
    """The form in which answers are compared, such as `2 t shirts` for "The two T-shirts."; idempotent.

    In this order; a step that VQA lacks says so.

    1. Typographic apostrophes become `'`, and the text Unicode's NFKC (VQA has neither); then it is lower-cased.
    2. A comma between digits goes: 1,000 is 1000. A colon between digits stays: 2:50. (VQA lets every colon stay.)
    3. All other punctuation becomes a space, but for points, apostrophes and `% & #`.
    4. A point stays before a digit (1.5) and else goes: u.s. is us. (Several on end are a space, unlike in VQA.)
    5. An apostrophe stays within a word, so that girl's is not girls; quotation marks go. (VQA lets them stay.)
    6. Number words up to ten become digits, and "none" becomes 0.
    7. A contraction without its apostrophe gets it: dont is don't.
    8. The articles a, an, the go, unless there is nothing else, such as the letter A. (VQA leaves nothing.)
    9. One space stays between words, none around them.
    """
    text = unicodedata.normalize("NFKC", answer.translate(_APOSTROPHES)).lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d):|:(?!\d)|\.{2,}", " ", text)
    text = "".join(" " if _is_punctuation(character) else character for character in text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", "", text)
    # Once more: what went may have stood between a letter and its accent.
    words = unicodedata.normalize("NFKC", text).split()
    words = [_CONTRACTIONS.get(word, _NUMBERS.get(word, word)) for word in words]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _is_punctuation(character: str) -> bool:
    if character in "%&#.':":
        return False
    return character in "=+<>`~^|" or unicodedata.category(character).startswith("P")
