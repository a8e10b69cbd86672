"""Units that a response may write (RULES N10): converted only when the sample declares one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Unit:
    """`value * factor + offset` is the value in the dimension's base unit."""

    dimension: str
    factor: Fraction
    offset: Fraction = Fraction(0)


TABLE: dict[str, dict[str, str]] = {
    "length": {
        "mm millimeter millimeters millimetre millimetres": "0.001",
        "cm centimeter centimeters centimetre centimetres": "0.01",
        "dm decimeter decimeters decimetre decimetres": "0.1",
        "m meter meters metre metres 米": "1",
        "km kilometer kilometers kilometre kilometres 公里": "1000",
        "inch inches": "0.0254",
        "ft foot feet": "0.3048",
        "yd yard yards": "0.9144",
        "mi mile miles": "1609.344",
        "厘米": "0.01",
        "毫米": "0.001",
    },
    "time": {
        "ns nanosecond nanoseconds": "0.000000001",
        "us µs μs microsecond microseconds": "0.000001",
        "ms millisecond milliseconds": "0.001",
        "s sec secs second seconds 秒": "1",
        "min mins minute minutes 分 分钟": "60",
        "h hr hrs hour hours 小时": "3600",
        "day days 天": "86400",
        "week weeks": "604800",
    },
    "mass": {
        "mg milligram milligrams": "0.000001",
        "g gram grams 克": "0.001",
        "kg kilogram kilograms kilo kilos 公斤 千克": "1",
        "t ton tons tonne tonnes": "1000",
        "lb lbs pound pounds": "0.45359237",
        "oz ounce ounces": "0.028349523125",
    },
    "area": {
        "mm^2 mm2": "0.000001",
        "cm^2 cm2": "0.0001",
        "m^2 m2 sqm 平方米": "1",
        "km^2 km2": "1000000",
        "ft^2 ft2 sqft": "0.09290304",
        "ha hectare hectares": "10000",
    },
    "volume": {
        "ml milliliter milliliters millilitre millilitres": "0.000001",
        "l liter liters litre litres 升": "0.001",
        "cm^3 cm3": "0.000001",
        "m^3 m3": "1",
    },
    "speed": {"m/s mps": "1", "km/h kmh kph": "0.27777777777777777777", "mph": "0.44704"},
    "angle": {"degree degrees deg °": "1", "rad radian radians": "57.29577951308232087680"},
    "temperature": {"celsius °c": "1", "kelvin": "1"},
    "frequency": {"hz hertz": "1", "khz": "1000", "mhz": "1000000", "ghz": "1000000000"},
    "force": {"n newton newtons": "1", "kn": "1000"},
    "power": {"w watt watts": "1", "kw": "1000"},
    "energy": {"j joule joules": "1", "kj": "1000"},
    "pressure": {"pa pascal pascals": "1", "kpa": "1000"},
    "voltage": {"v volt volts": "1", "mv": "0.001", "kv": "1000"},
    "current": {"amp amps ampere amperes": "1", "ma": "0.001"},
}
UNITS: dict[str, Unit] = {
    name: Unit(dimension, Fraction(factor))
    for dimension, row in TABLE.items()
    for names, factor in row.items()
    for name in names.split()
}
UNITS["km/h"] = UNITS["kmh"] = UNITS["kph"] = Unit("speed", Fraction(5, 18))
UNITS["kelvin"] = Unit("temperature", Fraction(1), Fraction(-27315, 100))
UNITS["fahrenheit"] = UNITS["°f"] = Unit("temperature", Fraction(5, 9), Fraction(-160, 9))
UNIT_TEXT = re.compile(
    r"\s*-?(?:(?P<square>square|sq\.?|cubic|平方|立方)\s*)?(?P<name>°\s?[CFcf]\b|°|[A-Za-zµμ]+|秒|分钟|分|小时|天|公里|厘米|毫米|平方米|米|公斤|千克|克|升)"
    r"(?P<power>\s*\^\s*\{?[23]\}?|[23](?!\d))?(?P<per>\s*/\s*[A-Za-z]+|\s+per\s+[A-Za-z]+)?"
)


def read_unit(text: str, at: int) -> Unit | None:
    """The known unit that stands at `at`, or None. Singles (m, s, g …) are matched by case where case matters."""
    found = UNIT_TEXT.match(text, at, at + 60)
    if not found:
        return None
    name = found["name"].replace(" ", "").casefold()
    if found["per"]:
        below = re.sub(r"\s*(?:/|per)\s*", "", found["per"])
        pair = UNITS.get(name), UNITS.get(below.casefold())
        if all(pair):
            return Unit(
                f"{pair[0].dimension}/{pair[1].dimension}".replace("length/time", "speed"),
                pair[0].factor / pair[1].factor,
            )
        return None
    unit = UNITS.get(name)
    if unit is None or unit.dimension != "length":
        return unit
    power = 2 if found["square"] in ("square", "sq", "sq.", "平方") else 3 if found["square"] else 1
    if found["power"]:
        power = 3 if "3" in found["power"] else 2
    if power == 1:
        return unit
    return Unit({2: "area", 3: "volume"}[power], unit.factor**power)
