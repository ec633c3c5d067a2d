"""The metrics against values by hand, by official scripts and by libraries."""

import math

import pytest

from unimoe_model.evaluation.metrics import METRICS
from unimoe_model.evaluation.metrics.choice import chosen_option, right_option, with_options
from unimoe_model.evaluation.metrics.cider import caption_words, cider
from unimoe_model.evaluation.metrics.exact import exact_match
from unimoe_model.evaluation.metrics.score import Score
from unimoe_model.evaluation.metrics.vqa import normalize_answer, vqa_accuracy
from unimoe_model.evaluation.metrics.wer import normalize_speech, word_error_rate
from unimoe_model.evaluation.samples import Sample


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_of_ten_people(matches, accuracy):
    people = ["dog"] * matches + ["cat"] * (10 - matches)
    assert vqa_accuracy("dog", people) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "people", "accuracy"),
    [
        # Outputs of the official script (GT-Vision-Lab/VQA, a013f00), in percent.
        ("two", ["2"] * 3 + ["3"] * 7, 90),
        ("the dog", ["dog", "Dog.", "a dog", *["cat"] * 7], 90),
        ("1,000 people!", ["1000 people"] * 2 + ["1000"] * 8, 60),
        ("dont know", ["don't know"] + ["no"] * 9, 30),
        ("3.5", ["3.5"] * 4 + ["35"] * 6, 100),
        ("black/white", ["black white"] * 4 + ["black"] * 6, 100),
        ("none", ["0"] * 2 + ["1"] * 8, 60),
        ("", ["x"] * 9 + ["y"], 0),
        ("it's 10:30", ["its 10:30"] * 3 + ["it's 10:30"] * 2 + ["no"] * 5, 60),
        ("t-shirt", ["t shirt"] * 3 + ["shirt"] * 7, 90),
    ],
)
def test_vqa_accuracy_beside_the_official_script(answer, people, accuracy):
    assert 100 * vqa_accuracy(answer, people) == pytest.approx(accuracy)


def test_vqa_answers_are_processed_where_all_people_agree():
    """The official script compares them unprocessed there, and gives 0."""
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1


def test_vqa_accuracy_needs_other_people():
    with pytest.raises(ValueError, match=r"answers \(3\) must be those of at least 4 people"):
        vqa_accuracy("dog", ["dog"] * 3)


@pytest.mark.parametrize(
    ("answer", "processed"),
    [
        ("The two dogs, dont know.", "2 dogs don't know"),
        ("U.S.A.", "usa"),
        ("$1,000.50!", "$1000.50"),
        ("a/b", "b"),
        ("a / b", "b"),
        ("youd've  yalld've\nshe'dve", "you'd've yalld've she'd've"),
        ("she'll well were", "she'll well were"),
        ("Ten\tnone", "10 0"),
    ],
)
def test_vqa_processing(answer, processed):
    assert normalize_answer(answer) == processed


def test_exact_match_after_the_processing_of_squad():
    assert exact_match("The Red,  circle!", ["blue", "red circle"]) == 1
    assert exact_match("red circles", ["red circle"]) == 0
    assert exact_match("", ["red"]) == 0
    assert exact_match("theatre", ["atre"]) == 0


OPTIONS = ["two dogs", "A cat", "a hot dog", "dog"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("d.", "D"),
        ("**C**", "C"),
        ("B. a cat", "B"),
        ("B. two dogs", "B"),
        ("(C) x", "C"),
        ("B\n\nExplanation: dog", "B"),
        ("C. Vitamin A.", "C"),
        ("The answer is B", "B"),
        ("answer: **D**.", "D"),
        ("Option A is right", "A"),
        ("The correct choice is (C), dog", "C"),
        ("the answer is A cat", "B"),
        ("a cat", "B"),
        ("It is a hot dog", "C"),
        ("A dog runs", "D"),
        ("", None),
        ("E", None),
        ("E. dog", None),
        ("A or B", None),
        ("option A or B", None),
        ("Both option A and option B", None),
        ("A. two dogs B. a cat C. a hot dog", None),
        ("A. two dogs\nB. a cat", None),
        ("a dog and a cat", None),
        ("doghouse", None),
    ],
)
def test_chosen_option(answer, letter):
    assert chosen_option(answer, OPTIONS) == (None if letter is None else "ABCD".index(letter))


def test_options_with_one_text_have_only_their_letters():
    assert chosen_option("a dog", ["dog", "cat", "Dog"]) is None
    assert chosen_option("C", ["dog", "cat", "Dog"]) == 2


def test_right_option_is_a_letter_or_a_text():
    assert right_option("D", OPTIONS) == 3
    assert right_option("a hot dog", OPTIONS) == 2
    for answer in ("E", "hot dog", "b"):
        with pytest.raises(ValueError, match=r"must be the letter \(A to D\) or the text of one"):
            right_option(answer, OPTIONS)
    with pytest.raises(ValueError, match="only one of these"):
        right_option("B", ["B", "A"])


def test_options_follow_the_question():
    assert with_options("what?", ["x", "y"]).splitlines()[:3] == ["what?", "A. x", "B. y"]
    assert with_options("", ["x", "y"]).startswith("A. x\n")


# Made with pycocoevalcap 1.2: its PTBTokenizer (Java) and Cider.
CAPTIONS = [
    "A dog runs on the grass.",
    "Two men ride horses (brown ones)",
    "rain falls and thunder rumbles!!!",
    "a woman doesn't smile",
]
REFERENCES = [
    ["A brown dog is running on the grass", "The dog runs over a lawn."],
    ["Two men are riding brown horses.", "men ride horses on a beach"],
    ["Rain is falling, and thunder rumbles loudly", "Heavy rain and thunder"],
    ["A woman who doesn't smile", "the woman's face is serious", "an unsmiling woman"],
]
CIDER_VALUE = 2.2658868666448244
CIDER_PER_ITEM = [2.4416991029023567, 2.0997209388967564, 2.574105394860664, 1.948022029919522]


def test_cider_beside_the_coco_tools():
    score = cider(CAPTIONS, REFERENCES)
    assert score.value == pytest.approx(CIDER_VALUE, rel=1e-12)
    assert score.per_item == pytest.approx(CIDER_PER_ITEM, rel=1e-12)


def test_cider_beside_the_installed_library():
    library = pytest.importorskip(
        "pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed"
    )
    captions = [*CAPTIONS, "a", "", "the the the dog dog on on", "grass " * 9]
    references = [
        *REFERENCES,
        ["a b"],
        ["the dog"],
        ["the dog dog on the dog", "on"],
        ["grass"] * 2,
    ]
    joined = [[" ".join(caption_words(text)) for text in texts] for texts in references]
    value, per_item = library.Cider().compute_score(
        dict(enumerate(joined)),
        {i: [" ".join(caption_words(text))] for i, text in enumerate(captions)},
    )
    score = cider(captions, references)
    assert score.value == pytest.approx(value, rel=1e-12)
    assert score.per_item == pytest.approx(list(per_item), rel=1e-12)


def test_cider_by_hand():
    """Every word is in one of two items (idf log 2), and one of the four lengths counts.

    Of the second, y against y and z has cosine 1/sqrt(2), and the caption lacks a bigram.
    """
    score = cider(["x", "y"], [["x"], ["y z"]])
    assert score.per_item == pytest.approx(
        [10 / 4, 10 / 4 / math.sqrt(2) * math.exp(-1 / (2 * 6**2))]
    )


def test_cider_ignores_what_all_items_say():
    assert cider(["x", "x"], [["x"], ["x"]]).per_item == [0, 0]


def test_cider_of_the_references_themselves():
    references = [["a red dog runs home now"], ["two cats sleep on my sofa"], ["rain falls down"]]
    score = cider([texts[0] for texts in references], references)
    # No 4-grams in a caption of three words: 3 of the 4 lengths count.
    assert score.per_item == pytest.approx([10, 10, 7.5])


def test_cider_of_one_item_says_nothing():
    with pytest.raises(ValueError, match=r"items \(1\) must be at least 2"):
        cider(["dog"], [["dog"]])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        # What the Penn Treebank tokenizer of the COCO tools gives, brackets by other names.
        ("A man's dog doesn't like the T-shirt.", "a man 's dog does n't like the t-shirt"),
        ("A well-dressed woman (with a hat)", "a well-dressed woman ( with a hat )"),
        ('Two "old" men; one is 5\'10" tall.', "two old men one is 5 10 tall"),
        ("the cars' lights at 10:30 p.m. in the U.S.", "the cars lights at 10:30 p.m. in the u.s."),
        ("1,000 people & 3.5 dogs - what a day!", "1,000 people & 3.5 dogs what a day"),
        ("chirping... and -- a car", "chirping and a car"),
        ("they cannot, gonna", "they can not gon na"),
        ("a black/white 12-year-old o'clock", "a black/white 12-year-old o'clock"),
        ("fridge,stove,and sink!!!", "fridge stove and sink !!!"),
        ("‘curly’ “quotes” don’t", "curly quotes do n't"),
    ],
)
def test_caption_words(caption, words):
    assert caption_words(caption) == words.split()


def test_word_error_rate_by_hand():
    pytest.importorskip("jiwer", reason="jiwer is not installed: pip install .[eval]")
    score = word_error_rate(
        ["Hello, the world", "", "it's twenty-five"], ["hello WORLD", "two words here", "It is 25."]
    )
    assert score.value == 4 / 8
    assert score.per_item == [0.5, 1.0, 0.0]
    assert score.details == {
        "substitutions": 0,
        "deletions": 3,
        "insertions": 1,
        "reference_words": 8,
    }


def test_word_error_rate_counts_by_dynamic_programming():
    pytest.importorskip("jiwer", reason="jiwer is not installed: pip install .[eval]")
    given, said = "the cat sat on on mat", "a cat sat down on the mat"
    distance = list(range(len(given.split()) + 1))
    for i, right in enumerate(said.split(), start=1):
        previous, distance[0] = distance[0], i
        for j, word in enumerate(given.split(), start=1):
            best = min(distance[j] + 1, distance[j - 1] + 1, previous + (word != right))
            previous, distance[j] = distance[j], best
    assert word_error_rate([given], [said]).value == pytest.approx(distance[-1] / 7)
    assert distance[-1] == 3


def test_word_error_rate_without_words():
    pytest.importorskip("jiwer", reason="jiwer is not installed: pip install .[eval]")
    with pytest.raises(ValueError, match=r"answer \('\(um\)'\) must hold a spoken word"):
        word_error_rate(["hello"], ["(um)"])


def test_word_error_rate_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'unimoe\[eval\]'"):
        word_error_rate(["hello"], ["hello"])


def test_speech_is_normalised_as_whisper_does():
    assert normalize_speech("Mr. Smith ISN'T here [laughs], um") == "mister smith is not here"


def test_score_is_the_mean():
    assert Score.mean([1.0, 0.0, 0.5], odd=2) == Score(0.5, [1.0, 0.0, 0.5], {"odd": 2})


def test_choices_are_scored():
    options = ("two dogs", "a cat")
    samples = [Sample(i, i, "", {}, (right,), options) for i, right in enumerate("ABBA")]
    score = METRICS["choice"].score(samples, ["A. two dogs", "a cat", "two dogs", "a bird"])
    assert score == Score(0.5, [1, 1, 0, 0], {"without_choice": 1})


def test_vqa_and_exact_are_scored_by_item():
    samples = [Sample(i, i, "", {}, ("dog", "dog", "cat", "cat")) for i in range(3)]
    answers = ["dog", "bird", "The cat"]
    assert METRICS["exact"].score(samples, answers) == Score(2 / 3, [1, 0, 1])
    # Two of four agree: 2/3 without one of the others, 1/3 without one of them.
    assert METRICS["vqa"].score(samples, answers).per_item == pytest.approx([0.5, 0, 0.5])
