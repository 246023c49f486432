"""The units that `math` knows, with their conversions, and how a phrase of them is read.

A unit that is not here is not dropped: an answer with it cannot be read.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Dimension = tuple[str, int]
"""What is measured, and its power: ("length", 2) is an area."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A product of known units."""

    factor: Fraction
    """One of it in the first unit of each dimension's table."""
    dimensions: tuple[Dimension, ...]
    """Sorted by name. Two units with the same dimensions convert into each other."""


_TABLES: dict[str, dict[str, str]] = {
    # dimension -> how many of the first unit -> the spellings; a plural s need not be listed
    "length": {
        "1": "meter metre m",
        "1/100": "centimeter centimetre cm",
        "1/1000": "millimeter millimetre mm",
        "1/10": "decimeter decimetre dm",
        "1000": "kilometer kilometre km",
        "0.0254": "inch inches in",
        "0.3048": "foot feet ft",
        "0.9144": "yard yd yds",
        "1609.344": "mile mi",
    },
    "mass": {
        "1": "gram gramme g",
        "1000": "kilogram kilogramme kilo kg kgs",
        "1/1000": "milligram mg",
        "1000000": "tonne",
        "453.59237": "pound lb lbs",
        "28.349523125": "ounce oz",
        "907184.74": "ton",
    },
    "time": {
        "1": "second sec secs s",
        "1/1000": "millisecond ms",
        "60": "minute min mins",
        "3600": "hour hr hrs h",
        "86400": "day",
        "604800": "week",
        "1209600": "fortnight",
    },
    "months": {"1": "month", "12": "year yr yrs", "120": "decade", "1200": "century centuries"},
    "volume": {
        "1": "liter litre L l",
        "1/1000": "milliliter millilitre ml mL",
        "0.473176473": "pint pt",
        "0.946352946": "quart qt",
        "3.785411784": "gallon gal",
        "0.2365882365": "cup",
        "0.01478676478125": "tablespoon tbsp",
        "0.00492892159375": "teaspoon tsp",
    },
    "dollars": {
        "1": "dollar buck USD usd",
        "1/100": "cent",
        "1/20": "nickel",
        "1/10": "dime",
        "1/4": "quarter",
    },
    "euros": {"1": "euro EUR eur"},
    "pounds sterling": {"1": "GBP gbp", "1/100": "pence penny pennies"},
    "yen": {"1": "yen JPY"},
    "rupees": {"1": "rupee INR"},
    "percent": {"1": "percent percentage pct"},
    "angle": {"1": "degree deg"},
    "radians": {"1": "radian rad"},
    "celsius": {"1": "degreeC degreec celsius"},
    "fahrenheit": {"1": "degreeF degreef fahrenheit"},
    "energy": {"1": "joule J", "1000": "kilojoule kJ", "4184": "kilocalorie kcal"},
    "calories": {"1": "calorie"},
    "power": {"1": "watt W", "1000": "kilowatt kW"},
    "force": {"1": "newton N"},
    "current": {"1": "ampere amp"},
    "voltage": {"1": "volt V"},
    "resistance": {"1": "ohm"},
    "frequency": {"1": "hertz Hz", "1000": "kHz"},
    "data": {"1": "byte", "1000": "kilobyte KB", "1000000": "megabyte MB", "1000000000": "GB"},
    "morning": {"1": "am a.m. AM"},
    "afternoon": {"1": "pm p.m. PM"},
}
_AREAS = {"acre": Fraction("4046.8564224"), "hectare": Fraction(10_000)}
_SPEEDS = {"mph": ("mile", "hour"), "kmh": ("km", "h"), "kph": ("km", "h")}
_COUNTED = """
    people:person adult child:children kid boy girl man:men woman:women student pupil teacher
    player friend guest member worker employee customer passenger visitor family:families animal
    dog cat puppy:puppies kitten chicken hen cow horse pig sheep goat duck fish:fishes bird rabbit
    bee ant insect spider leg egg apple orange banana pear peach grape strawberry:strawberries
    cherry:cherries lemon melon potato:potatoes tomato:tomatoes carrot pumpkin vegetable fruit nut
    cookie cake cupcake pie pizza slice sandwich:sandwiches burger bagel muffin donut
    candy:candies chocolate lollipop sweet piece bar bag box:boxes packet pack bottle can jar
    glass:glasses plate bowl spoon fork knife:knives basket bucket crate carton tray container
    book page word letter chapter magazine newspaper pen pencil crayon marker notebook paper sheet
    card sticker stamp photo photograph picture painting poster toy doll ball balloon marble bead
    block brick tile stick stone rock coin bill ticket token point goal game match:matches round
    question problem task chore lesson class:classes course test exam quiz:quizzes grade car truck
    bus:buses bike bicycle motorcycle train plane boat ship wheel tire seat trip lap step house
    home room floor door window wall chair table bed desk shelf:shelves lamp candle
    battery:batteries shirt shoe sock hat dress:dresses skirt jacket coat pair button ribbon
    flower rose tulip tree plant seed leaf:leaves bush:bushes branch:branches petal row column
    group team set side edge vertex:vertices face corner triangle square circle rectangle cube
    sphere polygon diagonal integer number digit solution root way pattern combination permutation
    outcome arrangement element factor divisor multiple prime unit occasion:times copy:copies item
    object thing penguin monkey elephant lion bear dinosaur gift present order call message email
    vote song movie episode video show performance pet frog turtle mouse:mice goldfish:goldfish
    bug cricket alligator jellybean pill shell seashell case serving loaf:loaves brownie bracelet
    necklace earring skip load berry:berries blueberry:blueberries bone scoop mark pancake
    dish:dishes chip daisy:daisies log parent envelope marshmallow star line gumball package text
    section barrel night dessert stripe acorn cracker firework bouquet ear stair nail spot steak
    mushroom pebble vehicle soda machine pastry:pastries tooth:teeth batch:batches cap hole clip
    roll straw grain novel article towel turn meal phone computer medal shot level jump brother
    sister follower voter racer singer sale sentence color colour kind mistake
"""
MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
"""Words between a number and its unit that multiply the number."""
_PREFIXES = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "cu.": 3}
_SUFFIXES = {"squared": 2, "cubed": 3}
_IGNORED = {"old", "each"}
"""Words after a unit that change nothing: 12 years old."""
_PIECE = re.compile(r"[A-Za-z.]+|\^[23]|/|\S")
_DEGREES_OF = re.compile(r"degrees? (?:(C)(?:elsius)?|(F)(?:ahrenheit)?)\b", re.IGNORECASE)
_ONE_LETTER = re.compile(r"[A-Za-z]")


@lru_cache(maxsize=1)
def _known() -> dict[str, Unit]:
    """Return every spelling with its unit."""
    units = {}
    for dimension, table in _TABLES.items():
        for factor, spellings in table.items():
            for spelling in spellings.split():
                units[spelling] = Unit(Fraction(factor), ((dimension, 1),))
    for entry in _COUNTED.split():
        singular, _, plural = entry.partition(":")
        units[singular] = Unit(Fraction(1), ((singular, 1),))
        if plural:
            units[plural] = units[singular]
    for name, square_meters in _AREAS.items():
        units[name] = Unit(square_meters, (("length", 2),))
    for name, (length, time) in _SPEEDS.items():
        units[name] = _product(units[length], units[time], -1)
    return units


def _lookup(word: str) -> Unit | None:
    """Return the unit of a word in the singular or plural; None for an unknown one."""
    known, bare = _known(), word.rstrip(".") if word.count(".") == 1 else word
    spellings = [bare] if _ONE_LETTER.fullmatch(bare) else [bare, bare.lower()]
    if len(bare) > 3 and bare.endswith("s"):
        spellings += [bare[:-1].lower(), bare[:-1]]
    return next((known[name] for name in spellings if name in known), None)


def _product(a: Unit, b: Unit, power: int) -> Unit:
    """Return a · b^power."""
    powers = dict(a.dimensions)
    for dimension, exponent in b.dimensions:
        powers[dimension] = powers.get(dimension, 0) + exponent * power
    dimensions = sorted((name, exponent) for name, exponent in powers.items() if exponent)
    return Unit(a.factor * b.factor**power, tuple(dimensions))


def read_unit(phrase: str) -> Unit | None:
    """Read a phrase such as "feet", "square cm", "m/s^2", "miles per hour" or "dollars each".

    Returns: None where a part of the phrase is not known.
    """
    unit, power, sign, last = Unit(Fraction(1), ()), 1, 1, None
    for piece in _PIECE.findall(_DEGREES_OF.sub(r"degree\1\2", phrase)):
        if piece in ("/", "per"):
            if last is None or sign < 0:
                return None
            sign, last = -1, None
        elif piece in _PREFIXES and last is None and power == 1:
            power = _PREFIXES[piece]
        elif piece in _SUFFIXES or re.fullmatch(r"\^[23]", piece):
            exponent = _SUFFIXES.get(piece) or int(piece[1])
            if last is None or power != 1:
                return None
            unit = _product(unit, last, sign * (exponent - 1))
        elif piece in _IGNORED and last is not None:
            continue
        else:
            known = _lookup(piece)
            if known is None or last is not None:
                return None
            last, unit = known, _product(unit, known, sign * power)
            power = 1
    return unit if last is not None else None
