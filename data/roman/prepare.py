"""Numbers from 1 to 3,999 in Roman numerals, one per line (1987=MCMLXXXVII): 3,599 train, 400 val lines.

--direction=from_roman writes MCMLXXXVII=1987, --direction=both writes both lines; neither line of a held-out
number is in train. No download.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.problems import line_parser, write_problems
from distrogpt.errors import CLOSE_OTHERS, cli_errors

VALUES = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
NUMERALS = dict(zip(VALUES, "M CM D CD C XC L XL X IX V IV I".split(), strict=True))


def roman(number: int) -> str:
    """A number from 1 to 3,999 in Roman numerals: from the left, the largest that still fits."""
    text = ""
    for value, numeral in NUMERALS.items():
        count, number = divmod(number, value)
        text += numeral * count
    return text


@cli_errors(CLOSE_OTHERS)
def main() -> None:
    parser = line_parser(sys.argv[0], __doc__.splitlines()[0])
    ways = ("to_roman", "from_roman", "both")
    about = "to_roman: 1987=MCMLXXXVII; from_roman: MCMLXXXVII=1987; both: two lines (default: to_roman)"
    parser.add_argument("--direction", choices=ways, default=ways[0], help=about)
    args = parser.parse_args()

    def lines_of(number: int) -> list[str]:
        number += 1  # there is no Roman 0
        lines = [f"{number}={roman(number)}", f"{roman(number)}={number}"]
        return {"to_roman": lines[:1], "from_roman": lines[1:], "both": lines}[args.direction]

    write_problems(args, 3999, lines_of)


if __name__ == "__main__":
    main()
