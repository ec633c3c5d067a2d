"""Short names of the things that emoji show, derived from Unicode names."""

import re
import unicodedata
from collections.abc import Collection

_MOST_WORDS = 3

# Pictographs up to Unicode 9, which all drawing styles have.
_RANGES = ((0x1F300, 0x1F6F7), (0x1F910, 0x1F960), (0x1F980, 0x1F9C1))

_WITH_FACES = (
    "bear cat cow dog fox frog hamster horse lion monkey mouse panda pig rabbit tiger unicorn wolf "
    "dragon robot clown"
)

_ALIASES = {
    **{f"{animal} face": animal for animal in _WITH_FACES.split()},
    "aubergine": "eggplant",
    "automobile": "car",
    "baby chick": "chick",
    "bactrian camel": "camel",
    "bath": "bathtub",
    "billiards": "billiard ball",
    "boar": "wild boar",
    "bowling": "bowling ball",
    "clapper board": "clapperboard",
    "cooked rice": "bowl of rice",
    "dagger knife": "dagger",
    "dark sunglasses": "sunglasses",
    "deciduous tree": "tree",
    "derelict house building": "ruined house",
    "dromedary camel": "camel",
    "ear of maize": "corn",
    "electric light bulb": "light bulb",
    "electric torch": "flashlight",
    "european castle": "castle",
    "extraterrestrial alien": "alien",
    "eyeglasses": "glasses",
    "father christmas": "santa claus",
    "fire engine": "fire truck",
    "firework sparkler": "sparkler",
    "front-facing baby chick": "chick",
    "game die": "die",
    "gem stone": "diamond",
    "hatching chick": "chick",
    "headphone": "headphones",
    "hocho": "knife",
    "honeybee": "bee",
    "hot pepper": "pepper",
    "house building": "house",
    "house buildings": "houses",
    "jack-o-lantern": "pumpkin",
    "lady beetle": "ladybug",
    "left-pointing magnifying glass": "magnifying glass",
    "lower left crayon": "crayon",
    "lower left paintbrush": "paintbrush",
    "mans shoe": "shoe",
    "mantelpiece clock": "clock",
    "meat on bone": "meat",
    "memo": "notepad",
    "military medal": "medal",
    "motor boat": "boat",
    "old key": "key",
    "older man": "old man",
    "older woman": "old woman",
    "oncoming automobile": "car",
    "oncoming bus": "bus",
    "oncoming police car": "police car",
    "oncoming taxi": "taxi",
    "personal computer": "laptop",
    "postal horn": "horn",
    "poultry leg": "chicken leg",
    "racing car": "race car",
    "racing motorcycle": "motorcycle",
    "right-pointing magnifying glass": "magnifying glass",
    "rolled-up newspaper": "newspaper",
    "round pushpin": "pushpin",
    "shopping trolley": "shopping cart",
    "slice of pizza": "pizza",
    "small airplane": "airplane",
    "airplane departure": "airplane",
    "airplane arriving": "airplane",
    "soft ice cream": "ice cream",
    "spouting whale": "whale",
    "straight ruler": "ruler",
    "studio microphone": "microphone",
    "t-shirt": "shirt",
    "telephone receiver": "telephone",
    "triangular ruler": "ruler",
    "vertical traffic light": "traffic light",
    "horizontal traffic light": "traffic light",
    "water buffalo": "buffalo",
    "womans boots": "boot",
    "womans clothes": "blouse",
    "womans hat": "hat",
    "womans sandal": "sandal",
    "wastebasket": "waste basket",
    "wrapped present": "gift",
}
"""Everyday names; several characters may have one name."""

_NO_THING = re.compile(
    r"clock face|symbol|sign\b|arrow|circled|squared|modifier|button|input|letter|mark\b|only\b|"
    r"prohibited|non-|no |radical|trigram|ideograph|place of|with |variation|selector|\band\b|"
    r" face$|face |restroom|baggage|customs|passport|luggage|moon |globe|cityscape|card |chart|"
    r"fist|hand$|japan|slider|knobs|compression|currency|keycap|label|ledger|silhouette|person|"
    r"place medal|mode|phone off|diamond|pointing|bubble|evil|oncoming|sunset|sunrise|"
    r"beating|growing|sparkling|revolving|two hearts|heart decoration|wedding|love|direct hit|"
    r"speech|mother|thought|cinema|haircut|massage|shrug|selfie|juggling|wrestl|polo|fenc|bicyclist|"
    r"tanabata|oden|dango|izakaya|kaaba|moyai|prayer|emblem|badge|decoration|ceremony|department|"
    r"convenience|bank|hotel|automated|office|accommodation|closet|building c|book$|folder|tray|"
    r"envelope|dvd|disc|cassette|pager|station|metro|light rail|tram$|trolleybus|aerial|mountain |"
    r"suspension|monorail|cooking|pot of|stuffed|incoming|mail|milky|foggy|fog$|cyclone|wave|"
    r"vibration|multiple|score|goblin|ogre|\bimp$|hole|kiss|eyes|bow|runner|pedestrian|golfer|surfer|"
    r"swimmer|snowboarder|lifter|guardsman|worker|dancer|dancing|spy|officer|tuxedo|bride|pregnant|"
    r"princ|racing$|children|barber|performing|bridge|stadium|motorway|school$|classical|school s"
)
"""Emoji that are not things, are indistinguishable at this size, or have no everyday name."""


def emoji_names() -> dict[str, str]:
    """Returns the everyday name of each character that shows a thing; several may share one."""
    found = {}
    for start, stop in _RANGES:
        for character in map(chr, range(start, stop)):
            name = unicodedata.name(character, "").lower()
            short = _ALIASES.get(name, name)
            is_thing = name in _ALIASES or not _NO_THING.search(name)
            if name and is_thing and len(short.split()) <= _MOST_WORDS:
                found[character] = short
    return found


def known_name(caption: str, names: Collection[str]) -> str:
    """Returns the longest suffix of a caption that is a known name, or else the caption.

    `"tamworth pig"` gives `"pig"`, and `"cluster of grapes"` gives `"grapes"`.
    """
    words = caption.split()
    ends = [" ".join(words[start:]) for start in range(len(words))]
    return next((end for end in ends if end in names), caption)
